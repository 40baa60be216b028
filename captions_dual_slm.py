"""Captions as a fixed number of the LLM's tokens: what the paralinguistic embeddings spell, and how they are read."""

import re
from typing import Any

import torch

from .tokens_dual_slm import encode, encode_pieces


class CaptionSlots:
    """Spells a caption template over a fixed number of the LLM's tokens, one for each paralinguistic embedding.

    A field takes as many slots as its longest label has tokens. The token of a space fills up a shorter label.

    Args:
        tokenizer: the LLM's.
        template: for example `"({gender} voice, {emotion} emotion)"`.
        labels: the classes of each field.
    """

    def __init__(self, tokenizer, template: str, labels: dict[str, list[str]]):
        fields = re.findall(r"{(\w+)}", template)
        if sorted(fields) != sorted(labels):
            raise ValueError(f"the template has the fields {fields}, the labels are for {sorted(labels)}.")
        unknown = getattr(tokenizer, "unk_token_id", None)  # not every tokenizer has a token of a space
        filler = next(ids[0] for text in " ,." if (ids := encode(tokenizer, text)) and ids[0] != unknown)
        parts, glue, before = [], "", ""
        for part in re.split(r"({\w+})", template):
            if not part:
                continue
            if part[0] != "{":
                # Tokens carry the space before a word, so a space that ends a fixed part belongs to the label after it.
                glue = " " if part.endswith(" ") else ""
                text = part[: len(part) - len(glue)]
                parts.append({"tokens": encode_pieces(tokenizer, [text], before)[0] if text else []})
                before += text
                continue
            name = part[1:-1]
            spelled = encode_pieces(tokenizer, [glue + label for label in labels[name]], before)
            width = max(len(tokens) for tokens in spelled)
            padded = [tokens + [filler] * (width - len(tokens)) for tokens in spelled]
            parts.append({"attribute": name, "labels": dict(zip(labels[name], padded, strict=True))})
            before += glue + labels[name][0]
        self._place(parts, labels)

    @classmethod
    def from_layout(cls, layout: list[dict[str, Any]], labels: dict[str, list[str]]) -> "CaptionSlots":
        """The slots that `layout` described; their tokens are the indices in it."""
        slots = cls.__new__(cls)
        slots._place(layout, labels)
        return slots

    def _place(self, parts: list[dict[str, Any]], labels: dict[str, list[str]]) -> None:
        self.labels, self._parts = labels, parts
        self.fixed: dict[int, int] = {}  # slot -> token
        self.fields: dict[str, slice] = {}
        self.spelling: dict[str, dict[str, list[int]]] = {}
        self.places: list[slice] = []  # slots of each part of the template
        slot = 0
        for part in parts:
            tokens = part["tokens"] if "tokens" in part else next(iter(part["labels"].values()))
            place = slice(slot, slot + len(tokens))
            if "tokens" in part:
                self.fixed |= dict(zip(range(place.start, place.stop), tokens, strict=True))
            else:
                name = part["attribute"]
                self.fields[name] = place
                self.spelling[name] = {label: part["labels"][label] for label in labels[name]}
            self.places.append(place)
            slot = place.stop
        self.num_slots = slot
        spelled = [t for field in self.spelling.values() for tokens in field.values() for t in tokens]
        self.token_ids = sorted({*self.fixed.values(), *spelled})

    def layout(self) -> list[dict[str, Any]]:
        """The parts of the template, each token as its index into `token_ids`: how to read logits without a tokenizer."""
        index = {token: i for i, token in enumerate(self.token_ids)}

        def indices(tokens: list[int]) -> list[int]:
            return [index[token] for token in tokens]

        return [
            {"tokens": indices(part["tokens"])}
            if "tokens" in part
            else part | {"labels": {label: indices(tokens) for label, tokens in part["labels"].items()}}
            for part in self._parts
        ]

    def label_tokens(self) -> torch.Tensor:
        """(1 + labels, slots): the tokens of the fixed text, then those of each label of each field; -1 elsewhere."""
        rows = torch.full((1 + sum(map(len, self.spelling.values())), self.num_slots), -1)
        for slot, token in self.fixed.items():
            rows[0, slot] = token
        spelled = [(self.fields[name], tokens) for name, field in self.spelling.items() for tokens in field.values()]
        for row, (place, tokens) in zip(rows[1:], spelled, strict=True):
            row[place] = torch.tensor(tokens)
        return rows

    def nearest(self, other: "CaptionSlots") -> list[int]:
        """For each slot of another spelling of this template, the slot here that has the same part of the text."""
        pairs = zip(self.places, other.places, strict=True)
        return [min(own.start + n, max(own.stop - 1, 0)) for own, new in pairs for n in range(new.stop - new.start)]

    def targets(self, attributes: dict[str, str | None], ignore_index: int = -100) -> list[int]:
        """Index into `token_ids` for each slot; `ignore_index` where the attribute is unknown."""
        index = {token: i for i, token in enumerate(self.token_ids)}
        target = [ignore_index] * self.num_slots
        for slot, token in self.fixed.items():
            target[slot] = index[token]
        for name, place in self.fields.items():
            label = attributes.get(name)
            if label is not None:
                target[place] = [index[token] for token in self.spelling[name][label]]
        return target

    def probabilities(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, V) logits of one clip over `token_ids` -> (labels,) of each attribute."""
        log_probabilities = logits.float().log_softmax(-1)
        index = {token: i for i, token in enumerate(self.token_ids)}
        result = {}
        for name, place in self.fields.items():
            scores = []
            for label in self.labels[name]:
                columns = torch.tensor([index[token] for token in self.spelling[name][label]], device=logits.device)
                scores.append(log_probabilities[place].gather(1, columns[:, None]).sum())
            result[name] = torch.stack(scores).softmax(0)
        return result

    def read(self, logits: torch.Tensor) -> dict[str, dict[str, float]]:
        """(N, V) logits of one clip over `token_ids` -> the probability of each label of each attribute."""
        found = self.probabilities(logits)
        return {name: dict(zip(self.labels[name], found[name].tolist(), strict=True)) for name in found}
