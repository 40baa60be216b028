"""Stage 0: the losses and the loop that teach the adapters without running the LLM (ours, see README).

The linguistic adapter learns character CTC. The paralinguistic adapter learns to spell captions, one token for each of
its outputs, or labels. All of them read cached features of the frozen encoder.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .batches import batched
from .corpora.row import Row
from .features import FeatureStore, pad_frames
from .files import atomic
from .hardware import TRIM_EVERY, fast_autocast, trim_heap
from .spelling import label_losses, label_rows, label_targets, spell_letters
from .text import nothing_said

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Descent:
    """How one adapter of stage 0 is optimised: a linear warm-up to `learning_rate`, then a cosine.

    Args:
        evaluate: called with the step; returns figures for the log, which has an entry every `evaluate_every` steps.
        checkpoint: file that keeps the state at each entry. A run that finds it continues from there to the same result.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    seed: int = 0
    evaluate: Callable[[int], dict[str, Any]] | None = None
    evaluate_every: int = 250
    checkpoint: Path | None = None

    def rate(self, step: int) -> float:
        """Factor of the learning rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def descend(
    adapter: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[torch.Generator], torch.Tensor],
    args: Descent,
    stage: str,
    skip: Callable[[int], object] = lambda done: None,
) -> Log:
    """Optimises an adapter. (seed, step) seed every draw of a step, so a resumed run ends in the same bits.

    Args:
        loss: of the batch that a generator draws.
        stage: names the part of stage 0 in the log and the progress bar.
        skip: called with the number of steps already done, to bring the batches to the same place.

    Returns:
        The log: stage, step, smoothed loss and what `evaluate` returned.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, args.rate)
    log, running, done = [], None, 0
    if args.checkpoint is not None and args.checkpoint.is_file():
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log, running, done = state["log"], state["running"], state["step"]
        skip(done)
    adapter.train()
    bar = tqdm(range(done + 1, args.steps + 1), desc=stage, initial=done, total=args.steps)
    for step in bar:
        seed = args.seed * 1_000_003 + step
        torch.manual_seed(seed)  # dropout
        batch_loss = loss(torch.Generator().manual_seed(seed))
        value = batch_loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step} of stage 0, {stage}: lower the learning rate."
            )
        optimizer.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % TRIM_EVERY == 0:
            trim_heap()
        running = value if running is None else 0.97 * running + 0.03 * value
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        if step % args.evaluate_every == 0 or step == args.steps:
            adapter.eval()
            figures = args.evaluate(step) if args.evaluate is not None else {}
            adapter.train()
            log.append({"stage": stage, "step": step, "loss": round(running, 4)} | figures)
            tqdm.write(str(log[-1]))
            if args.checkpoint is not None:
                state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                state |= {"schedule": schedule.state_dict(), "log": log, "running": running}
                with atomic(args.checkpoint) as scratch:
                    torch.save(state, scratch)
    adapter.eval()
    return log


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
    """SpecAugment on encoder frames: a little noise, and two short masks of time.

    Args:
        states: (A, T, C).
        lengths: (A,) frames.
        strong: many longer masks of time, and two of channels. Without them character CTC overfits ten hours of speech.
    """
    device = states.device  # draws are made on the CPU, so that every device has the same
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


def train_letters(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[Row],
    args: Descent,
    frames_per_batch: int = 12_000,
) -> Log:
    """Character CTC of the linguistic adapter, on cached frames. Transcripts that are too long for their audio are left out.

    Raises:
        ValueError: no transcript fits.
    """
    adapter = model.linguistic_adapter
    device, clips = next(adapter.parameters()).device, []
    for row in tqdm(rows, desc="lengths", leave=False):
        text, length = row.transcript or "", store.length(row)
        target = torch.tensor(spell_letters(text, adapter.alphabet), dtype=torch.long)
        # CTC needs an output for each letter, and one for a blank between equal letters.
        needed = len(target) + int((target[1:] == target[:-1]).sum())
        if needed <= -(-length // adapter.rate) * adapter.rate and (len(target) or nothing_said(text)):
            clips.append((row, target, length))
    if not clips:
        raise ValueError(f"none of the {len(rows)} rows has a transcript that its audio has room for.")
    lengths = [length for *_, length in clips]
    batches = batches_by_length(lengths, frames_per_batch, np.random.default_rng(args.seed))

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = [clips[i] for i in next(batches)]
        targets = [target for _, target, _ in batch]
        states, sizes = (tensor.to(device) for tensor in pad_frames([store.get(row) for row, *_ in batch]))
        states = mask_frames(states, sizes, generator, strong=True)
        with fast_autocast(device):
            logits = adapter.logits(states, sizes).float()
        return nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(targets).to(device),
            adapter.output_lengths(sizes) * adapter.rate,
            torch.tensor([len(target) for target in targets], device=device),
            blank=logits.shape[-1] - 1,
            zero_infinity=True,
        )

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    return descend(adapter, optimizer, loss, args, "linguistic", lambda done: deque(islice(batches, done), maxlen=0))


def train_captions(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[Row],
    targets: torch.Tensor,
    args: Descent,
    batch_size: int = 256,
) -> Log:
    """Cross entropy of each output over the caption tokens, on cached pooled statistics.

    Half of the draws are clips with a known emotion, so that the many clips without one do not dominate.

    Args:
        targets: (rows, N) caption tokens, -100 for an unknown attribute; see [`spelling.caption_targets`].
    """
    adapter = model.paralinguistic_adapter
    token_rows = adapter.soft_tokens.rows(model.get_input_embeddings())
    device = token_rows.device
    pooled, targets = torch.stack([store.get(row, "pooled") for row in rows]).to(device), targets.to(device)
    if not adapter.statistics_mean.any():  # a trained adapter keeps its statistics
        adapter.statistics_mean.copy_(pooled.mean(0))
        adapter.statistics_scale.copy_(pooled.std(0).clamp(min=1e-4))
    felt = torch.tensor([row.emotion is not None for row in rows])
    weight = torch.where(felt, 0.5 / felt.sum().clamp(min=1), 0.5 / (~felt).sum().clamp(min=1))

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = torch.multinomial(weight, batch_size, replacement=True, generator=generator).to(device)
        inputs = pooled[batch]
        noise = torch.randn(inputs.shape, generator=generator).to(device) * adapter.statistics_scale
        logits = adapter.soft_tokens.logits(adapter.project(inputs + 0.2 * noise), token_rows)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), label_smoothing=0.05)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.learning_rate, weight_decay=0.05)
    return descend(adapter, optimizer, loss, args, "paralinguistic")


def train_queries(
    model: DualSLMForConditionalGeneration,
    store: FeatureStore,
    rows: list[Row],
    processor: DualSLMProcessor,
    args: Descent,
    batch_size: int = 32,
    fresh: bool = True,
) -> Log:
    """The query adapter's outputs learn to be the LLM's own embeddings of the labels ([`spelling.label_losses`]).

    Args:
        fresh: start from the mean of the labels; otherwise the adapter continues as it is.
    """
    adapter, anchors = model.paralinguistic_adapter, label_rows(model, processor)
    if fresh:
        with torch.no_grad():
            adapter.output.weight.zero_()
            adapter.output.bias.copy_(torch.cat(list(anchors.values())).mean(0))
    device = next(adapter.parameters()).device
    targets = label_targets(rows, processor).to(device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = torch.randint(0, len(rows), (batch_size,), generator=generator)
        states, lengths = (tensor.to(device) for tensor in store.batch([rows[i] for i in batch]))
        with fast_autocast(device):
            outputs = adapter.read(mask_frames(adapter.mix(states), lengths, generator), lengths)
        return label_losses(outputs, targets[batch], list(anchors.values())).mean()

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.learning_rate, weight_decay=0.05)
    return descend(adapter, optimizer, loss, args, "queries")


def read_labels(
    model: DualSLMForConditionalGeneration, store: FeatureStore, rows: list[Row], processor: DualSLMProcessor
) -> dict[str, float]:
    """Accuracy of each attribute: the label whose embedding has the largest product with the mean of its outputs."""
    anchors, figures = label_rows(model, processor), {}
    for place, (name, labels) in enumerate((processor.attribute_labels or {}).items()):
        known, right = [row for row in rows if row.label(name) in labels], 0
        for part in batched(known, 40):
            with torch.inference_mode():
                outputs, _ = model.paralinguistic_adapter(*(t.to(model.device) for t in store.batch(part)))
            best = (outputs[:, place :: len(anchors)].mean(1) @ anchors[name].T).argmax(-1)
            right += sum(labels[i] == row.label(name) for i, row in zip(best.tolist(), part, strict=True))
        if known:
            figures[name] = round(right / len(known), 4)
    return figures
