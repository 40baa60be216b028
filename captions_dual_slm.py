"""Captions as a fixed number of the LLM's tokens: what the paralinguistic embeddings spell, and how they are read."""

import re

import torch


class CaptionSlots:
    """Spells a caption template over a fixed number of the LLM's tokens, one for each paralinguistic embedding.

    A field takes as many slots as its longest label has tokens. The token of a space fills up a shorter label.

    Args:
        tokenizer: the LLM's.
        template: for example `"({gender} voice, {emotion} emotion)"`.
        labels: the classes of each field.
    """

    def __init__(self, tokenizer, template: str, labels: dict[str, list[str]]):
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        fields = re.findall(r"{(\w+)}", template)
        if sorted(fields) != sorted(labels):
            raise ValueError(f"the template has the fields {fields}, the labels are for {sorted(labels)}.")
        (filler,) = encode(" ")[:1]
        self.labels = labels
        self.fixed: dict[int, int] = {}  # slot -> token
        self.fields: dict[str, slice] = {}
        self.spelling: dict[str, dict[str, list[int]]] = {}
        slot, glue = 0, ""
        for part in re.split(r"({\w+})", template):
            if not part:
                continue
            if part[0] != "{":
                # Tokens carry the space before a word, so a space that ends a fixed part belongs to the label after it.
                glue = " " if part.endswith(" ") else ""
                for token in encode(part[: len(part) - len(glue)]):
                    self.fixed[slot] = token
                    slot += 1
                continue
            name = part[1:-1]
            spelled = {label: encode(glue + label) for label in labels[name]}
            width = max(len(tokens) for tokens in spelled.values())
            self.spelling[name] = {k: v + [filler] * (width - len(v)) for k, v in spelled.items()}
            self.fields[name] = slice(slot, slot + width)
            slot += width
        self.num_slots = slot
        spelled = [t for field in self.spelling.values() for tokens in field.values() for t in tokens]
        self.token_ids = sorted({*self.fixed.values(), *spelled})

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

    def read(self, logits: torch.Tensor) -> dict[str, dict[str, float]]:
        """(N, V) logits of one clip over `token_ids` -> the probability of each label of each attribute."""
        log_probabilities = logits.float().log_softmax(-1)
        index = {token: i for i, token in enumerate(self.token_ids)}
        result = {}
        for name, place in self.fields.items():
            scores = []
            for label in self.labels[name]:
                columns = torch.tensor([index[token] for token in self.spelling[name][label]], device=logits.device)
                scores.append(log_probabilities[place].gather(1, columns[:, None]).sum())
            result[name] = dict(zip(self.labels[name], torch.stack(scores).softmax(0).tolist(), strict=True))
        return result
