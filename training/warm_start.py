"""Stage 0: teach both adapters to speak in the LLM's own token embeddings, without running the LLM (ours, see README).

The linguistic adapter learns by CTC over the LLM's tokens, the paralinguistic adapter to spell captions, one token for
each of its outputs. Both read cached features of the frozen encoder.
"""

import collections
import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..configuration_dual_slm import ALPHABET
from ..modeling_dual_slm import DualSLMForConditionalGeneration, Lexicon
from ..processing_dual_slm import DualSLMProcessor, plain_text
from .backbones import cpu_has_bfloat16
from .features import FeatureStore, pad_frames

TRIM_EVERY = 10  # steps
MOST_PAIRS = 200_000  # of words, 12 bytes each in the checkpoint

# --------------------------------------------------------------------------------------------------------------------
# Spelling
# --------------------------------------------------------------------------------------------------------------------


_UNSPOKEN = re.compile(r"\([^)]*\)|\[[^\]]*\]")


def nothing_said(transcript: str) -> bool:
    """Whether a transcript says that there are no words: "(no speech)", "[noise]"."""
    return not _UNSPOKEN.sub("", transcript).strip()


def spelled_out(transcript: str, alphabet: str = ALPHABET) -> bool:
    """Whether `normalize` keeps all that is said: it has no figures, and no letters but the alphabet's."""
    said = (letter for letter in plain_text(transcript) if letter.isalnum())
    return nothing_said(transcript) or all(letter in alphabet for letter in said)


def normalize(text: str, alphabet: str = ALPHABET) -> list[str]:
    """What is said as bare lower-case words: what CTC can hear. Parentheses within a text are read aloud like the rest."""
    text = "" if nothing_said(text) else plain_text(text)
    text = "".join(letter if letter in alphabet else " " for letter in text)
    return [word.strip("'") for word in text.split() if word.strip("'")]


class Speller:
    """Spells words over a subset of the LLM's tokens; each word begins with a space.

    A word whose own tokens are all in the subset is spelled by them, any other by the longest match.

    Args:
        tokenizer: the LLM's.
        words: words with their counts, of which the `size` most frequent tokens are taken.
        size: tokens of the subset.
    """

    def __init__(self, tokenizer, words: dict[str, int], size: int):
        self._start(tokenizer)
        counts: collections.Counter[int] = collections.Counter()
        for word, count in words.items():
            for token in self._encode(word):
                counts[token] += count
        # Letters and the space, so that nothing is left unspelled; "Ġ" is how byte-level tokenizers write a space.
        known = tokenizer.get_vocab()
        spellings = [s + c for s in ("Ġ", "") for c in ("", *"abcdefghijklmnopqrstuvwxyz'")]
        letters = [known[spelling] for spelling in spellings if spelling in known]
        common = [token for token, _ in counts.most_common() if token not in set(letters)]
        self._use((letters + common)[:size])

    @classmethod
    def of(cls, tokenizer, token_ids: list[int]) -> "Speller":
        """The speller over the pieces that an adapter has learnt (`soft_tokens.token_ids`)."""
        speller = cls.__new__(cls)
        speller._start(tokenizer)
        speller._use(token_ids)
        return speller

    def _start(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self._words: dict[str, list[int]] = {}

    def _use(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.index = {token: i for i, token in enumerate(token_ids)}
        self._strings = {self.tokenizer.convert_ids_to_tokens(token): i for i, token in enumerate(token_ids)}

    def _encode(self, word: str) -> list[int]:
        return self.tokenizer(" " + word, add_special_tokens=False)["input_ids"]

    def spell(self, word: str) -> list[int]:
        """Indices into `token_ids`."""
        if word not in self._words:
            tokens = self._encode(word)
            if all(token in self.index for token in tokens):
                self._words[word] = [self.index[token] for token in tokens]
            else:
                rest, pieces = "Ġ" + word, []
                while rest:
                    size = next((n for n in range(len(rest), 0, -1) if rest[:n] in self._strings), 0)
                    if not size:
                        raise ValueError(f"{word!r} cannot be spelled: {rest[0]!r} is not among the pieces.")
                    pieces.append(self._strings[rest[:size]])
                    rest = rest[size:]
                self._words[word] = pieces
        return self._words[word]

    def __call__(self, text: str) -> list[int]:
        return [piece for word in normalize(text) for piece in self.spell(word)]


class Letters:
    """Spells texts in the letters of an alphabet, the space among them."""

    def __init__(self, alphabet: str):
        self.alphabet = alphabet

    def __call__(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) for letter in " ".join(normalize(text, self.alphabet))]


def lexicon_rows(
    tokenizer, words: dict[str, int], pairs: dict[tuple[str, str], int], alphabet: str
) -> dict[str, torch.Tensor]:
    """The buffers of a [`Lexicon`]: the words that are short enough, by their counts, all of the LLM's tokens that are
    letters alone, to spell the others with, and the pairs of these words that are said more than once.

    Args:
        words, pairs: with their counts.
    """
    letters = set(alphabet[1:])
    rows: dict[str, tuple[int, list[int]]] = {}
    for letter in alphabet[1:]:  # which a byte-level tokenizer may take several tokens for
        rows[letter] = (0, tokenizer(letter, add_special_tokens=False)["input_ids"])
        if len(rows[letter][1]) > Lexicon.most:
            raise ValueError(f"this tokenizer takes more than {Lexicon.most} tokens for the letter {letter!r}.")
    for token, number in tokenizer.get_vocab().items():
        spelling = tokenizer.convert_tokens_to_string([token])
        if spelling and letters.issuperset(spelling.removeprefix(" ")):
            rows[spelling] = (0, [number])
    for word, count in words.items():
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if letters.issuperset(word):
            rows[" " + word] = (count, ids if len(ids) <= Lexicon.most else [])
    rows = {spelling: row for spelling, row in sorted(rows.items()) if len(spelling) <= Lexicon.longest}
    place = {letter: i for i, letter in enumerate(alphabet, 1)}
    spellings = torch.zeros(len(rows), Lexicon.longest, dtype=torch.uint8)
    token_ids = torch.full((len(rows), Lexicon.most), -1, dtype=torch.int32)
    for row, (spelling, (_, ids)) in enumerate(rows.items()):
        spellings[row, : len(spelling)] = torch.tensor([place[letter] for letter in spelling], dtype=torch.uint8)
        token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    counts = torch.tensor([count for count, _ in rows.values()], dtype=torch.int32)
    row_of = {spelling[1:]: row for row, spelling in enumerate(rows) if counts[row]}
    often = {pair: count for pair, count in pairs.items() if count > 1 and row_of.keys() >= set(pair)}
    often = sorted(often.items(), key=lambda item: (-item[1], item[0]))[:MOST_PAIRS]
    return {
        "spellings": spellings,
        "counts": counts,
        "token_ids": token_ids,
        "pairs": torch.tensor([(row_of[a], row_of[b], n) for (a, b), n in often], dtype=torch.int32).reshape(-1, 3),
    }


# --------------------------------------------------------------------------------------------------------------------
# Linguistic: CTC
# --------------------------------------------------------------------------------------------------------------------


def batches_by_length(lengths: list[int], limit: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless batches of similar length with at most `limit` padded frames, in random order, by `rng` alone."""
    while True:
        noisy = np.array(lengths) * np.exp(rng.normal(0, 0.1, len(lengths)))
        batches, batch, longest = [], [], 0
        for index in np.argsort(noisy):
            longest = max(longest, lengths[index])
            if batch and longest * (len(batch) + 1) > limit:
                batches.append(batch)
                batch, longest = [], lengths[index]
            batch.append(int(index))
        batches.append(batch)
        for i in rng.permutation(len(batches)):
            yield batches[i]


def mask_frames(
    states: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator, strong: bool = False
) -> torch.Tensor:
    """SpecAugment's masks and a little noise, on encoder frames: two short ones of time, or `strong`, longer ones all along
    and two of channels, without which letters know ten hours by heart."""
    device = states.device  # what is drawn is the same on all
    states = states + 0.1 * torch.randn(states.shape, generator=generator).to(device)
    time, channel = torch.arange(states.shape[1]), torch.arange(states.shape[2])
    masks, widest, end = (max(2, len(time) // 60), 20, len(time)) if strong else (2, 12, lengths.cpu())
    for _ in range(masks):
        width = torch.randint(0, widest, (len(lengths),), generator=generator)
        start = (torch.rand(len(lengths), generator=generator) * end).long()
        hidden = (time >= start[:, None]) & (time < (start + width)[:, None])
        states = states.masked_fill(hidden[..., None].to(device), 0.0)
    for _ in range(2 if strong else 0):
        width = torch.randint(0, max(1, 5 * len(channel) // 64), (len(lengths),), generator=generator)
        start = torch.randint(0, len(channel), (len(lengths),), generator=generator)
        hidden = (channel >= start[:, None]) & (channel < (start + width)[:, None])
        states = states.masked_fill(hidden[:, None].to(device), 0.0)
    return states


def train_linguistic(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[dict],
    speller: Speller | Letters,
    steps: int,
    learning_rate: float = 1e-3,
    frames_per_batch: int = 12_000,
    warmup: int = 100,
    seed: int = 0,
    sampled_pieces: int = 0,
    evaluate: Callable[[int], dict] | None = None,
    evaluate_every: int = 250,
    checkpoint: Path | None = None,
) -> list[dict]:
    """CTC of the linguistic adapter over `speller`'s tokens, for which the LLM gives its embedding rows and never runs, or
    over letters.

    Args:
        store, rows: features of these rows, which have transcripts.
        sampled_pieces: of the pieces that no clip of a batch says, so many are drawn to stand for all of them in the
            softmax (each weighs as much as it stands for): most of a step's cost is the product with the pieces. 0: all.
        evaluate: called with the step every `evaluate_every` steps; returns figures for the log.
        checkpoint: file that the run is kept in and, if it is there, goes on from, to the same result.

    Returns:
        The log: step, loss and what `evaluate` returned.
    """
    adapter, embedding = model.linguistic_adapter, model.get_input_embeddings()
    device = next(adapter.parameters()).device
    in_letters = isinstance(speller, Letters)
    if not in_letters:
        widen(adapter.soft_tokens, speller.token_ids)
    targets = [torch.tensor(speller(row["transcript"]), dtype=torch.long) for row in rows]
    lengths = [store.length(row) for row in tqdm(rows, desc="lengths", leave=False)]
    # CTC needs a frame for each piece and one between equal neighbours.
    per_output = adapter.rate if in_letters else 1
    room = [-(-length // adapter.rate) * per_output for length in lengths]
    usable = [
        i
        for i, row in enumerate(rows)
        if len(targets[i]) + _repeats(targets[i]) <= room[i] and (len(targets[i]) or nothing_said(row["transcript"]))
    ]
    if not usable:
        raise ValueError(f"none of the {len(rows)} rows has a transcript that its audio has room for.")
    batches = batches_by_length([lengths[i] for i in usable], frames_per_batch, np.random.default_rng(seed))
    pieces = None if in_letters else adapter.soft_tokens.rows(embedding)

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = [usable[i] for i in next(batches)]
        states, sizes = pad_frames([store.get(rows[i]) for i in batch])
        states, sizes = states.to(device), sizes.to(device)
        states = mask_frames(states, sizes, generator, strong=in_letters)
        spelled = torch.cat([targets[i] for i in batch])
        with fast_autocast(device):
            if in_letters:
                logits = adapter.logits(states, sizes).float()
            else:
                drawn, offset = draw_pieces(spelled, len(pieces), sampled_pieces, generator)
                chosen = pieces[drawn.to(device)]
                logits = adapter.soft_tokens.logits(adapter.project(states, sizes), chosen).float()
                logits[..., :-1] += offset.to(device)
                place = torch.zeros(len(pieces), dtype=torch.long).index_put((drawn,), torch.arange(len(drawn)))
                spelled = place[spelled]
        return nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            spelled.to(device),
            adapter.output_lengths(sizes) * per_output,
            torch.tensor([len(targets[i]) for i in batch], device=device),
            blank=logits.shape[-1] - 1,
            zero_infinity=True,
        )

    about = {"stage": "linguistic"} | ({} if in_letters else {"pieces": len(pieces)})
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))

    def skip(count: int) -> None:
        for _ in range(count):
            next(batches)

    return _descend(adapter, optimizer, loss, steps, warmup, about, seed, evaluate, evaluate_every, checkpoint, skip)


def _descend(
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    warmup: int,
    about: dict,
    seed: int,
    evaluate: Callable[[int], dict] | None,
    evaluate_every: int,
    checkpoint: Path | None,
    skip: Callable[[int], None] | None = None,
) -> list[dict]:
    """`steps` steps on `loss` with a warm-up and a cosine; the log has a running loss and what `evaluate` returned.

    Every draw of a step is seeded by (seed, step), so a run that goes on from its checkpoint is the uninterrupted one.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, warmup, steps))
    log, running, done = [], None, 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log, running, done = state["log"], state["running"], state["step"]
        if skip is not None:
            skip(done)
    adapter.train()
    bar = tqdm(
        range(done + 1, steps + 1), desc=", ".join(str(value) for value in about.values()), initial=done, total=steps
    )
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at step {step} of {about}: lower the learning rate.")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % TRIM_EVERY == 0:
            trim_heap()
        running = value.item() if running is None else 0.97 * running + 0.03 * value.item()
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        if step % evaluate_every == 0 or step == steps:
            entry = about | {"step": step, "loss": round(running, 4)}
            if evaluate is not None:
                adapter.eval()
                entry |= evaluate(step)
                adapter.train()
            log.append(entry)
            tqdm.write(str(entry))
            if checkpoint is not None:
                state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                state |= {"schedule": schedule.state_dict(), "log": log, "running": running}
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                scratch = checkpoint.with_suffix(".part")
                torch.save(state, scratch)
                os.replace(scratch, checkpoint)
    adapter.eval()
    return log


def fast_autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products where they are fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16())


def trim_heap() -> None:
    """Gives freed memory back to the system, where the C library can. `dual-slm train` keeps what is freed in the heap (see
    `cli.py`), and batches of all lengths leave holes there that no other batch fits into: gigabytes after a hundred steps."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def draw_pieces(
    spelled: torch.Tensor, total: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pieces of a sampled softmax: all that are `spelled`, `count` others, and what to add to each one's logit so that
    the sum over them stands for the sum over all `total`."""
    used = spelled.unique()
    if not count or len(used) + count >= total:
        return torch.arange(total), torch.zeros(total)
    others = torch.ones(total, dtype=torch.bool).index_fill(0, used, False).nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)[:count]]
    offset = torch.zeros(len(used) + count)
    offset[len(used) :] = math.log((total - len(used)) / count)
    return torch.cat([used, others]), offset


def widen(soft: nn.Module, token_ids: list[int]) -> None:
    """Another set of pieces for the same output space: what was learnt stays, the product has other rows."""
    soft.token_ids = torch.tensor(token_ids, device=soft.token_ids.device)


def _repeats(target: torch.Tensor) -> int:
    return int((target[1:] == target[:-1]).sum())


def _warm_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --------------------------------------------------------------------------------------------------------------------
# Paralinguistic: captions
# --------------------------------------------------------------------------------------------------------------------


def caption_targets(rows: list[dict], processor: DualSLMProcessor) -> torch.Tensor:
    """(rows, N) indices of caption pieces, -100 for what a row does not say."""
    labels = processor.attribute_labels
    known = [{name: row[name] for name in labels if row[name] in labels[name]} for row in rows]
    return torch.tensor([processor.caption_slots.targets(attributes) for attributes in known])


def train_paralinguistic(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[dict],
    targets: torch.Tensor,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    weight_decay: float = 0.05,
    seed: int = 0,
    evaluate: Callable[[int], dict] | None = None,
    evaluate_every: int = 250,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Cross entropy of each output over the caption pieces, on cached pooled statistics (seconds a run).

    Slots whose attribute is unknown do not count. Clips with a known emotion are drawn half of the time, so that the many
    clips without one do not drown them.
    """
    adapter = model.paralinguistic_adapter
    pieces = adapter.soft_tokens.rows(model.get_input_embeddings())
    device = pieces.device
    pooled, targets = torch.stack([store.get(row, "pooled") for row in rows]).to(device), targets.to(device)
    if not adapter.statistics_mean.any():  # going on, it is read as it was
        adapter.statistics_mean.copy_(pooled.mean(0))
        adapter.statistics_scale.copy_(pooled.std(0).clamp(min=1e-4))
    felt = torch.tensor([row["emotion"] is not None for row in rows])
    weight = torch.where(felt, 0.5 / felt.sum().clamp(min=1), 0.5 / (~felt).sum().clamp(min=1))

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = torch.multinomial(weight, batch_size, replacement=True, generator=generator).to(device)
        inputs = pooled[batch]
        noise = torch.randn(inputs.shape, generator=generator).to(device) * adapter.statistics_scale
        logits = adapter.soft_tokens.logits(adapter.project(inputs + 0.2 * noise), pieces)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), label_smoothing=0.05)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=weight_decay)
    about = {"stage": "paralinguistic"}
    return _descend(adapter, optimizer, loss, steps, 50, about, seed, evaluate, evaluate_every, checkpoint)


# --------------------------------------------------------------------------------------------------------------------
# Query adapter: labels
# --------------------------------------------------------------------------------------------------------------------


LABEL_SCALE = 10.0  # as soft tokens start: embedding rows are short


def label_rows(model: DualSLMForConditionalGeneration, processor: DualSLMProcessor) -> dict[str, torch.Tensor]:
    """Attribute -> (labels, D): each label as the mean of the LLM's embedding rows of its tokens."""
    weight, tokenizer = model.get_input_embeddings().weight.detach().float(), processor.tokenizer
    return {
        name: torch.stack(
            [weight[tokenizer(f" {text}", add_special_tokens=False)["input_ids"]].mean(0) for text in labels]
        )
        for name, labels in processor.attribute_labels.items()
    }


def label_targets(rows: list[dict], processor: DualSLMProcessor) -> torch.Tensor:
    """(rows, attributes) indices of labels, -100 for what a row does not say."""
    known = processor.attribute_labels.items()
    places = [[labels.index(row[name]) if row[name] in labels else -100 for name, labels in known] for row in rows]
    return torch.tensor(places)


def label_losses(outputs: torch.Tensor, targets: torch.Tensor, anchors: list[torch.Tensor]) -> torch.Tensor:
    """What the query adapter learns without the LLM: its outputs are dealt out to the attributes and are to be the rows of
    their labels. Of each, the squared distance to its row (whose best answer is the mixture of rows by their probability,
    as soft tokens are) and the cross entropy over all labels' rows.

    Args:
        outputs: (A, N, D).
        targets: (A, attributes), see [`label_targets`].
        anchors: (labels, D) of each attribute, see [`label_rows`].

    Returns:
        (A,), summed over the attributes that are known.
    """
    total = torch.zeros(len(outputs), device=outputs.device)
    for place, rows in enumerate(anchors):
        own, target = outputs[:, place :: len(anchors)].float(), targets[:, place]
        logits = LABEL_SCALE * (own @ rows.T)
        repeated = target[:, None].expand(logits.shape[:2])
        entropy = nn.functional.cross_entropy(
            logits.transpose(1, 2), repeated, label_smoothing=0.05, reduction="none"
        ).mean(1)
        spread = (rows - rows.mean(0)).pow(2).sum(-1).mean()
        distance = (own - rows[target.clamp(min=0)][:, None]).pow(2).sum(-1).mean(1) / spread
        total = total + torch.where(target >= 0, entropy + distance, 0.0)
    return total


def read_labels(model, store: FeatureStore, rows: list[dict], processor, batch_size: int = 40) -> dict[str, float]:
    """Accuracy of each attribute by the product of its tokens' mean with the labels' rows: what training is watched by."""
    anchors, figures = label_rows(model, processor), {}
    for place, (name, labels) in enumerate(processor.attribute_labels.items()):
        known, right = [row for row in rows if row[name] in labels], 0
        for start in range(0, len(known), batch_size):
            part = known[start : start + batch_size]
            with torch.inference_mode():
                outputs, _ = model.paralinguistic_adapter(*(t.to(model.device) for t in store.batch(part)))
            mean = outputs[:, place :: len(anchors)].mean(1)
            best = (mean @ anchors[name].T).argmax(-1)
            right += sum(labels[i] == row[name] for i, row in zip(best.tolist(), part, strict=True))
        if known:
            figures[name] = round(right / len(known), 4)
    return figures


def train_queries(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[dict],
    processor: DualSLMProcessor,
    steps: int,
    learning_rate: float = 5e-4,
    batch_size: int = 32,
    weight_decay: float = 0.05,
    seed: int = 0,
    fresh: bool = True,
    evaluate: Callable[[int], dict] | None = None,
    evaluate_every: int = 100,
    checkpoint: Path | None = None,
) -> list[dict]:
    """The query adapter's outputs learn to be the LLM's own embeddings of the labels ([`label_losses`]); the LLM never
    runs."""
    adapter, anchors = model.paralinguistic_adapter, label_rows(model, processor)
    if fresh:
        with torch.no_grad():  # it begins by saying the mean of the labels
            adapter.output.weight.zero_()
            adapter.output.bias.copy_(torch.cat(list(anchors.values())).mean(0))
    device = next(adapter.parameters()).device
    targets = label_targets(rows, processor).to(device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = torch.randint(0, len(rows), (batch_size,), generator=generator)
        states, lengths = store.batch([rows[i] for i in batch])
        states, lengths = states.to(device), lengths.to(device)
        with fast_autocast(device):
            outputs = adapter.read(mask_frames(adapter.mix(states), lengths, generator), lengths)
        return label_losses(outputs, targets[batch], list(anchors.values())).mean()

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=weight_decay)
    about = {"stage": "queries"}
    return _descend(adapter, optimizer, loss, steps, 50, about, seed, evaluate, evaluate_every, checkpoint)
