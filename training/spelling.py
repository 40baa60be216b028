"""Spells transcripts, captions and labels as what stage 0 teaches the adapters: letters, caption tokens, embedding rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from ..letters_dual_slm import Lexicon
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .corpora.row import Row
from .text import normalize

MAX_BIGRAMS = 200_000  # 12 bytes each in the checkpoint
LABEL_SCALE = 10.0  # of the logits of labels, like that of new soft tokens: embedding rows are short


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a text, without those that the tokenizer would add."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spell_letters(text: str, alphabet: str) -> list[int]:
    """Indices into the alphabet of a text's letters, spaces included."""
    return [alphabet.index(letter) for letter in " ".join(normalize(text, alphabet))]


def lexicon_rows(
    tokenizer, words: Mapping[str, int], bigrams: Mapping[tuple[str, str], int], alphabet: str
) -> dict[str, torch.Tensor]:
    """The buffers of a [`Lexicon`], from the LLM's tokenizer and the counts of words and bigrams.

    They hold the words that are short enough, every token of the LLM that consists of letters, which spell all other
    words, and the bigrams of these words that occur more than once.

    Raises:
        ValueError: the tokenizer needs too many tokens for one letter.
    """
    entries = _lexicon_entries(tokenizer, words, alphabet)
    letter_ids = {letter: i for i, letter in enumerate(alphabet, 1)}
    spellings = torch.zeros(len(entries), Lexicon.longest, dtype=torch.uint8)
    token_ids = torch.full((len(entries), Lexicon.most), -1, dtype=torch.int32)
    for row, (spelling, (_, ids)) in enumerate(entries.items()):
        spellings[row, : len(spelling)] = torch.tensor([letter_ids[letter] for letter in spelling])
        token_ids[row, : len(ids)] = torch.tensor(ids)
    counts = torch.tensor([count for count, _ in entries.values()], dtype=torch.int32)
    row_of = {spelling[1:]: row for row, spelling in enumerate(entries) if counts[row]}
    often = {bigram: count for bigram, count in bigrams.items() if count > 1 and row_of.keys() >= set(bigram)}
    ordered = sorted(often.items(), key=lambda item: (-item[1], item[0]))[:MAX_BIGRAMS]
    pairs = torch.tensor([(row_of[a], row_of[b], n) for (a, b), n in ordered], dtype=torch.int32).reshape(-1, 3)
    return {"spellings": spellings, "counts": counts, "token_ids": token_ids, "pairs": pairs}


def _lexicon_entries(tokenizer, words: Mapping[str, int], alphabet: str) -> dict[str, tuple[int, list[int]]]:
    """Spelling -> (count, token ids), sorted by spelling. A space begins a spelling that begins a word."""
    letters = set(alphabet[1:])
    entries = {letter: (0, encode(tokenizer, letter)) for letter in alphabet[1:]}
    for letter, (_, ids) in entries.items():
        if len(ids) > Lexicon.most:  # a byte-level tokenizer may need several
            raise ValueError(f"this tokenizer takes more than {Lexicon.most} tokens for the letter {letter!r}.")
    for token, number in tokenizer.get_vocab().items():
        spelling = tokenizer.convert_tokens_to_string([token])
        if spelling and letters.issuperset(spelling.removeprefix(" ")):
            entries[spelling] = (0, [number])
    for word, count in words.items():
        if letters.issuperset(word):
            ids = encode(tokenizer, f" {word}")
            entries[f" {word}"] = (count, ids if len(ids) <= Lexicon.most else [])
    return {spelling: row for spelling, row in sorted(entries.items()) if len(spelling) <= Lexicon.longest}


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
