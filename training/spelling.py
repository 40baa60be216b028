"""Spells transcripts, captions and labels as what stage 0 teaches the adapters: letters, caption tokens, embedding rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from ..tokens_dual_slm import encode
from .corpora.row import Row
from .text import normalize

LABEL_SCALE = 10.0  # of the logits of labels, like that of new soft tokens: embedding rows are short


def spell_letters(text: str, alphabet: str) -> list[int]:
    """Indices into the alphabet of a text's letters, spaces included."""
    return [alphabet.index(letter) for letter in " ".join(normalize(text, alphabet))]


def read_linguistic_state(file: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of the linguistic adapter in a checkpoint's model.safetensors, named as the adapter does."""
    prefix = "linguistic_adapter."
    state = {name.removeprefix(prefix): t for name, t in load_file(file).items() if name.startswith(prefix)}
    if "lexicon.counts" in state:  # written before there were bigrams, it has none
        state.setdefault("lexicon.pairs", torch.zeros(0, 3, dtype=torch.int32))
    return state


def caption_targets(rows: Sequence[Row], processor: DualSLMProcessor) -> torch.Tensor:
    """(rows, slots) indices of caption tokens, -100 where a row has no label."""
    slots = processor.caption_slots
    assert slots is not None, "a checkpoint without a caption template has no caption tokens"
    known = [{name: row.label(name) for name in slots.labels if row.label(name) in slots.labels[name]} for row in rows]
    return torch.tensor([slots.targets(attributes) for attributes in known])


def label_rows(model: DualSLMForConditionalGeneration, processor: DualSLMProcessor) -> dict[str, torch.Tensor]:
    """Attribute -> (labels, D): the mean of the LLM's embedding rows of each label's tokens."""
    embedding: Any = model.get_input_embeddings()
    weight, tokenizer = embedding.weight.detach().float(), processor.tokenizer
    return {
        name: torch.stack([weight[encode(tokenizer, f" {label}")].mean(0) for label in labels])
        for name, labels in (processor.attribute_labels or {}).items()
    }


def label_targets(rows: Sequence[Row], processor: DualSLMProcessor) -> torch.Tensor:
    """(rows, attributes) indices of labels, -100 where a row has no label."""
    known = processor.attribute_labels or {}
    index = {name: {label: i for i, label in enumerate(labels)} for name, labels in known.items()}
    return torch.tensor([[places.get(row.label(name) or "", -100) for name, places in index.items()] for row in rows])


def label_losses(outputs: torch.Tensor, targets: torch.Tensor, anchors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss (A,) of the query adapter against the embedding rows of the labels, summed over the known attributes.

    The loss of an output is its squared distance to the row of its label plus the cross entropy over the rows of all
    labels. The distance alone is least at the mean of the rows by their probability.

    Args:
        outputs: (A, N, D); output n belongs to the attribute n modulo their number.
        targets: (A, attributes), see [`label_targets`].
        anchors: (labels, D) of each attribute, see [`label_rows`].
    """
    total = torch.zeros(len(outputs), device=outputs.device)
    for place, rows in enumerate(anchors):
        own, target = outputs[:, place :: len(anchors)].float(), targets[:, place]
        logits = LABEL_SCALE * (own @ rows.T)
        repeated = target[:, None].expand(logits.shape[:2])
        entropies = cross_entropy(logits.transpose(1, 2), repeated, label_smoothing=0.05, reduction="none")
        spread = (rows - rows.mean(0)).pow(2).sum(-1).mean()
        distance = (own - rows[target.clamp(min=0)][:, None]).pow(2).sum(-1).mean(1) / spread
        total = total + torch.where(target >= 0, entropies.mean(1) + distance, 0.0)
    return total
