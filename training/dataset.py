"""The training set of one stage: rows -> items with drawn tasks and sources, and batches of similar size."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count

from torch.utils.data import Dataset

from .batches import batched
from .collator import Item, Teacher
from .corpora.row import Row
from .err import draw_sources
from .recipe import StageRecipe
from .tasks import label_sets, make_sample, tasks_of
from .text import hash_uniform

BUCKET_SPAN = 32  # batches whose rows are sorted by length together; not all of them, so that epochs differ


class StageDataset(Dataset[Item]):
    """Rows as the items of one stage. Rows of rare corpora are repeated if the stage says so.

    An item is a function of (seed, epoch, row) alone: it does not depend on the process or the order of reading.

    Args:
        positional_randomness: see `tasks.make_sample`.
        teacher: `Row.clip` -> the frozen LLM's log-probabilities of a dialogue's target.
        choices: the labels that prompts offer, as `tasks.label_sets`. Default: those of the rows.

    Raises:
        ValueError: no row has a target for any task of the stage.
    """

    def __init__(
        self,
        rows: list[Row],
        stage: StageRecipe,
        seed: int,
        positional_randomness: bool = True,
        teacher: Callable[[tuple[str, str, int | None]], Teacher | None] | None = None,
        choices: dict[tuple[str, str], list[str]] | None = None,
    ):
        self.stage, self.seed = stage, seed
        self.positional_randomness, self.teacher = positional_randomness, teacher
        self.choices = choices or label_sets(rows)
        self.rows = [row for row in rows if self._weights(row) for _ in range(stage.repeat.get(row.corpus, 1))]
        if not self.rows:
            raise ValueError(f"stage {stage.name}: no row has a target for any of {', '.join(stage.tasks)}.")
        if stage.balanced:
            self.rows = balance(self.rows, seed)
        numbers = defaultdict(count)
        # Number of each repetition of a row, so that repetitions are drawn apart.
        self.copies = [next(numbers[row.id, row.variant.copy]) for row in self.rows]

    def _weights(self, row: Row) -> dict[str, float]:
        return {task: self.stage.tasks[task] for task in tasks_of(row) if self.stage.tasks.get(task, 0) > 0}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        row, epoch = self.rows[index], epoch + 1_000_003 * self.copies[index]
        weights = self._weights(row)
        draw = random.Random(f"task/{self.seed}/{epoch}/{row.id}/{row.variant.copy}")
        task = draw.choices(list(weights), list(weights.values()))[0]
        return self.item(row, task, epoch)

    def item(self, row: Row, task: str, epoch: int = 0) -> Item:
        """The item of a row for one task."""
        sample = make_sample(row, task, self.choices, self.seed, epoch, self.positional_randomness, self.stage.facts)
        known = {"has_caption": "caption" in sample.spoken, "has_transcript": "transcript" in sample.spoken}
        sources = draw_sources(self.stage.source_rules, row, sample.kind, self.seed, epoch, **known)
        teacher = self.teacher(row.clip) if self.teacher is not None and task == "dialogue" else None
        return Item(sample, row, sources, teacher)

    def size(self, index: int, epoch: int = 0) -> int:
        """Length of an item's texts in characters, with the history as it is cut in this epoch."""
        return _size(self[epoch, index])


def _size(item: Item) -> int:
    size = len(item.sample.target) + len(item.row.transcript or "")
    for message in item.sample.messages:
        parts = message["content"]
        size += len(parts) if isinstance(parts, str) else sum(len(part.get("text", "")) for part in parts)
    return size


def balance(rows: list[Row], seed: int) -> list[Row]:
    """Repeats rows of rarer emotions until each emotion has as many as the most frequent one."""
    groups: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: hash_uniform(row.id, seed)):
        groups.setdefault(row.emotion, []).append(row)
    most = max(map(len, groups.values()))
    return [groups[emotion][n % len(groups[emotion])] for emotion in sorted(groups, key=repr) for n in range(most)]


class BucketSampler:
    """Batches of similar size, each with its share of every kind of task, by (seed, epoch) alone.

    The last, incomplete batch is left out.

    Args:
        batch_size: of all processes together.
        bucketing: without it, plain random batches (benchmark).

    Raises:
        ValueError: the dataset does not fill one batch.
    """

    drop_last = True

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int, bucketing: bool = True):
        if len(dataset) < batch_size:
            raise ValueError(f"a batch of {batch_size} is larger than the {len(dataset)} rows of the stage.")
        self.dataset, self.batch_size, self.seed, self.bucketing, self.epoch = dataset, batch_size, seed, bucketing, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draw, epoch = random.Random(f"batches/{self.seed}/{self.epoch}"), self.epoch
        order = list(range(len(self.dataset)))
        draw.shuffle(order)
        order = order[: len(self) * self.batch_size]
        if self.bucketing:
            spans = batched(order, BUCKET_SPAN * self.batch_size)
            order = [index for span in spans for index in self._mixed(span, epoch)]
        batches = batched(order, self.batch_size)
        draw.shuffle(batches)
        yield from ([(epoch, index) for index in batch] for batch in batches)

    def _mixed(self, span: list[int], epoch: int) -> list[int]:
        """A span in the order of size within each kind of task, so that each batch has the span's share of each kind."""
        kinds: dict[str, dict[int, int]] = defaultdict(dict)  # kind -> index -> size
        for index in span:
            item = self.dataset[epoch, index]
            kinds[item.sample.kind][index] = _size(item)
        ranks: dict[int, float] = {}
        for sizes in kinds.values():
            by_size = sorted(sizes, key=sizes.__getitem__)
            ranks |= {index: (place + 0.5) / len(by_size) for place, index in enumerate(by_size)}
        return sorted(span, key=ranks.__getitem__)
