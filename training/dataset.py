"""The training set of one stage: rows -> items with drawn tasks and sources, and batches of similar size."""

import random
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count

import numpy as np
from torch.utils.data import Dataset

from .batches import batched
from .collator import Item, Teacher
from .corpora.row import Row
from .err import draw_sources
from .labels import TASKS
from .recipe import StageRecipe
from .tasks import label_sets, make_sample, tasks_of
from .text import hash_uniform

BUCKET_SPAN = 32  # batches whose rows are sorted by length together; not all of them, so that epochs differ


@dataclass(frozen=True)
class Exposures:
    """What a stage asks of one corpus for one task: so many places an epoch, out of an endless repetition of its rows."""

    corpus: str
    task: str
    order: np.ndarray  # (n,) indices of the rows that have a target; by hash if an epoch leaves some out
    places: int  # instances an epoch

    def at(self, epoch: int, number: int) -> tuple[int, int]:
        """Index of the row at a place of an epoch, and how often the row has been met before."""
        visit, place = divmod(epoch * self.places + number, len(self.order))
        return int(self.order[place]), visit


def exposures(rows: list[Row], stage: StageRecipe, seed: int) -> list[Exposures]:
    """The exposures of each corpus and task that a stage maps and that a row has a target for, one an epoch at least."""
    found: dict[tuple[str, str], array] = {(c, task): array("i") for c, tasks in stage.tasks.items() for task in tasks}
    for index, row in enumerate(rows):
        for task in tasks_of(row) if row.corpus in stage.tasks else ():
            if (row.corpus, task) in found:
                found[row.corpus, task].append(index)
    groups = []
    for (corpus, task), members in found.items():
        times, order = stage.share(corpus, task), np.array(members)
        if times % 1:  # an epoch leaves rows out: any, and for each task others
            keys = [hash_uniform(f"{task}/{rows[i].id}/{rows[i].variant.copy}", seed) for i in members]
            order = order[np.argsort(keys, kind="stable")]
        if members:
            groups.append(Exposures(corpus, task, order, max(1, round(times * len(members)))))
    return groups


class StageDataset(Dataset[Item]):
    """Rows as the items of one stage.

    With shares of tasks, each row is an item, with one of its tasks. Rows of rare corpora are repeated if the stage says so.
    With tasks by corpus, each pair of a row and a task is an item in as many epochs, or as often in each, as the stage says.
    An item is a function of (seed, epoch, index) alone: it does not depend on the process or the order of reading.

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
        self.exposures = exposures(rows, stage, seed) if stage.by_corpus else []
        self._ends = list(accumulate(group.places for group in self.exposures))
        self.rows = rows if self.exposures else self._repeated(rows)
        if not self.rows:
            tasks = [f"{c}: {', '.join(part)}" for c, part in stage.tasks.items()] if stage.by_corpus else stage.tasks
            raise ValueError(f"stage {stage.name}: no row has a target for any of {', '.join(tasks)}.")
        if stage.balanced:
            self.rows = balance(self.rows, seed)
        # Number of each repetition of a row, so that repetitions are drawn apart.
        numbers = defaultdict(count)
        self.copies = [] if self.exposures else [next(numbers[row.id, row.variant.copy]) for row in self.rows]

    def _repeated(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if self._weights(row) for _ in range(self.stage.repeat.get(row.corpus, 1))]

    def _weights(self, row: Row) -> dict[str, float]:
        shares = {task: self.stage.share(row.corpus, task) for task in tasks_of(row)}
        return {task: share for task, share in shares.items() if share > 0}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else len(self.rows)

    def instances(self) -> dict[tuple[str, str], float]:
        """Instances an epoch of each (corpus, task); where rows draw one of their tasks, how many are expected."""
        if self.exposures:
            return {(group.corpus, group.task): group.places for group in self.exposures}
        expected: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            weights = self._weights(row)
            for task, weight in weights.items():
                expected[row.corpus, task] += weight / sum(weights.values())  # pyright: ignore[reportArgumentType]
        return dict(expected)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        if self.exposures:
            number = bisect_right(self._ends, index)
            group = self.exposures[number]
            place, visit = group.at(epoch, index - self._ends[number] + group.places)
            # Each visit is drawn apart, and each task of a visit: ERR's draws know the kind of a task alone.
            return self.item(self.rows[place], group.task, visit + 1_000_003 * TASKS.index(group.task))
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
