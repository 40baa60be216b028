"""Stage 0: teach both adapters to speak in the LLM's own token embeddings, without running the LLM (ours, see README).

The linguistic adapter learns by CTC over the LLM's tokens, the paralinguistic adapter to spell captions, one token for
each of its outputs. Both read cached features of the frozen encoder.
"""

import collections
import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .attributes import Thresholds, classify
from .features import FeatureCache, pad_frames

# --------------------------------------------------------------------------------------------------------------------
# Spelling
# --------------------------------------------------------------------------------------------------------------------


def normalize(text: str) -> list[str]:
    """What is said as bare lower-case words: what CTC can hear."""
    text = text.lower().replace("’", "'").replace("-", " ")
    return [word.strip("'") for word in re.sub(r"[^a-z' ]+", " ", text).split() if word.strip("'")]


class Speller:
    """Spells words over a subset of the LLM's tokens; each word begins with a space.

    A word whose own tokens are all in the subset is spelled by them, any other by the longest match.

    Args:
        tokenizer: the LLM's.
        words: words with their counts, of which the `size` most frequent tokens are taken.
        size: tokens of the subset.
    """

    def __init__(self, tokenizer, words: dict[str, int], size: int):
        self.tokenizer = tokenizer
        counts: collections.Counter[int] = collections.Counter()
        for word, count in words.items():
            for token in self._encode(word):
                counts[token] += count
        # Letters and the space, so that nothing is left unspelled; "Ġ" is how byte-level tokenizers write a space.
        known = tokenizer.get_vocab()
        spellings = [s + c for s in ("Ġ", "") for c in ("", *"abcdefghijklmnopqrstuvwxyz'")]
        letters = [known[spelling] for spelling in spellings if spelling in known]
        common = [token for token, _ in counts.most_common() if token not in set(letters)]
        self.token_ids = (letters + common)[:size]
        self.index = {token: i for i, token in enumerate(self.token_ids)}
        self._strings = {tokenizer.convert_ids_to_tokens(token): i for i, token in enumerate(self.token_ids)}
        self._words: dict[str, list[int]] = {}

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


def mask_frames(states: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """SpecAugment's time masks and a little noise, on encoder frames."""
    states = states + 0.1 * torch.randn(states.shape, generator=generator)
    time = torch.arange(states.shape[1])
    for _ in range(2):
        width = torch.randint(0, 12, (len(lengths),), generator=generator)
        start = (torch.rand(len(lengths), generator=generator) * lengths).long()
        hidden = (time >= start[:, None]) & (time < (start + width)[:, None])
        states = states.masked_fill(hidden[..., None], 0.0)
    return states


def train_linguistic(
    model: DualSLMForConditionalGeneration,
    cache: FeatureCache,
    speller: Speller,
    steps: int,
    learning_rate: float = 1e-3,
    frames_per_batch: int = 12_000,
    warmup: int = 100,
    seed: int = 0,
    evaluate: Callable[[int], dict] | None = None,
    evaluate_every: int = 250,
) -> list[dict]:
    """CTC of the linguistic adapter over `speller`'s tokens; the LLM gives its embedding rows and never runs.

    Args:
        cache: of rows with transcripts, kind "frames".
        evaluate: called with the step every `evaluate_every` steps; returns figures for the log.

    Returns:
        The log: step, loss and what `evaluate` returned.
    """
    adapter, embedding = model.linguistic_adapter, model.get_input_embeddings()
    soft = adapter.soft_tokens
    widen(soft, speller.token_ids)
    targets = [torch.tensor(speller(row["transcript"])) for row in cache.rows]
    lengths = [len(cache.get(i, "frames")) for i in tqdm(range(len(cache.rows)), desc="lengths", leave=False)]
    # CTC needs a frame for each piece and one between equal neighbours.
    room = [-(-length // adapter.rate) for length in lengths]
    usable = [i for i in range(len(targets)) if 0 < len(targets[i]) + _repeats(targets[i]) <= room[i]]
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    batches = batches_by_length([lengths[i] for i in usable], frames_per_batch, rng)
    rows = soft.rows(embedding)

    def loss() -> torch.Tensor:
        batch = [usable[i] for i in next(batches)]
        states, sizes = pad_frames([cache.get(i, "frames") for i in batch])
        states = mask_frames(states, sizes, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = adapter.project(states, sizes)
            logits = soft.logits(outputs, rows)
        return nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            torch.cat([targets[i] for i in batch]),
            adapter.output_lengths(sizes),
            torch.tensor([len(targets[i]) for i in batch]),
            blank=len(rows),
            zero_infinity=True,
        )

    about = {"stage": "linguistic", "pieces": len(rows)}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    return _descend(adapter, optimizer, loss, steps, warmup, about, evaluate, evaluate_every)


def _descend(
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    steps: int,
    warmup: int,
    about: dict,
    evaluate: Callable[[int], dict] | None,
    evaluate_every: int,
) -> list[dict]:
    """`steps` steps on `loss()` with a warm-up and a cosine; the log has a running loss and what `evaluate` returned."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, warmup, steps))
    log, running = [], None
    adapter.train()
    bar = tqdm(range(1, steps + 1), desc=", ".join(str(value) for value in about.values()))
    for step in bar:
        value = loss()
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at step {step} of {about}: lower the learning rate.")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = value.item() if running is None else 0.97 * running + 0.03 * value.item()
        bar.set_postfix(loss=f"{running:.3f}")
        if step % evaluate_every == 0 or step == steps:
            entry = about | {"step": step, "loss": round(running, 4)}
            if evaluate is not None:
                adapter.eval()
                entry |= evaluate(step)
                adapter.train()
            log.append(entry)
            tqdm.write(str(entry))
    adapter.eval()
    return log


def widen(soft: nn.Module, token_ids: list[int]) -> None:
    """Another set of pieces for the same output space: what was learnt stays, the product has other rows."""
    soft.token_ids = torch.tensor(token_ids)


def _repeats(target: torch.Tensor) -> int:
    return int((target[1:] == target[:-1]).sum())


def _warm_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --------------------------------------------------------------------------------------------------------------------
# Paralinguistic: captions
# --------------------------------------------------------------------------------------------------------------------


def caption_targets(cache: FeatureCache, processor: DualSLMProcessor, thresholds: Thresholds) -> torch.Tensor:
    """(rows, N) indices of caption pieces; attributes measured in the clip, gender and emotion from the table."""
    targets = []
    for index, row in enumerate(cache.rows):
        values = dict(zip(("pitch", "energy", "tempo"), cache.get(index, "measured").tolist(), strict=True))
        measured = classify({k: None if math.isnan(v) else v for k, v in values.items()}, thresholds)
        targets.append(
            processor.caption_slots.targets({"gender": row["gender"], "emotion": row["emotion"], **measured})
        )
    return torch.tensor(targets)


def train_paralinguistic(
    model: DualSLMForConditionalGeneration,
    cache: FeatureCache,
    targets: torch.Tensor,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    weight_decay: float = 0.05,
    seed: int = 0,
    evaluate: Callable[[int], dict] | None = None,
    evaluate_every: int = 250,
) -> list[dict]:
    """Cross entropy of each output over the caption pieces, on cached pooled statistics (seconds a run).

    Slots whose attribute is unknown do not count. Clips with a known emotion are drawn half of the time, so that the many
    clips without one do not drown them.
    """
    adapter = model.paralinguistic_adapter
    rows = adapter.soft_tokens.rows(model.get_input_embeddings())
    pooled = torch.stack([cache.get(i, "pooled") for i in range(len(cache.rows))])
    adapter.statistics_mean.copy_(pooled.mean(0))
    adapter.statistics_scale.copy_(pooled.std(0).clamp(min=1e-4))
    felt = torch.tensor([row["emotion"] is not None for row in cache.rows])
    weight = torch.where(felt, 0.5 / felt.sum().clamp(min=1), 0.5 / (~felt).sum().clamp(min=1))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout

    def loss() -> torch.Tensor:
        batch = torch.multinomial(weight, batch_size, replacement=True, generator=generator)
        inputs = pooled[batch]
        noise = torch.randn(inputs.shape, generator=generator) * adapter.statistics_scale
        logits = adapter.soft_tokens.logits(adapter.project(inputs + 0.2 * noise), rows)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), label_smoothing=0.05)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=weight_decay)
    return _descend(adapter, optimizer, loss, steps, 50, {"stage": "paralinguistic"}, evaluate, evaluate_every)
