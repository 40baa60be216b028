"""Collates samples into one padded batch: prompts by the processor, then the targets, which alone have a loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing_dual_slm import DualSLMProcessor
from ..templates_dual_slm import encode_answer
from ..tokens_dual_slm import encode
from .corpora.row import Row
from .err import Sources
from .features import FeatureStore
from .labels import TASKS
from .spelling import caption_targets, label_targets
from .tasks import Sample

Teacher = tuple[torch.Tensor, torch.Tensor]  # (n, k) token ids and log-probabilities


class DualSLMCollator:
    """Renders conversations through the LLM's own chat template.

    The loss mask follows the roles: prompt and target are tokenized apart, so nothing is searched for in text. With
    `with_prompts`, a batch has left-padded `prompt_input_ids` and `prompt_attention_mask` (B, S) to generate from.

    Raises:
        ValueError: the chat template changes or hides the assistant's answer (a template that adds "thinking").
    """

    def __init__(self, processor: DualSLMProcessor, with_prompts: bool = False):
        self.processor, self.with_prompts = processor, with_prompts
        self.tokenizer = processor.tokenizer
        ask = [{"role": "user", "content": "Question?"}]
        prompt = str(processor.apply_chat_template(ask, add_generation_prompt=True))
        whole = str(processor.apply_chat_template([*ask, {"role": "assistant", "content": "Answer."}]))
        start, answer, end = whole.rpartition("Answer.")
        if not answer or start.rstrip() != prompt.rstrip() or not start.startswith(prompt):
            raise ValueError(
                f"the chat template writes {whole!r} for a question and its answer, which does not begin with the prompt "
                f"{prompt!r} and the answer. Give a chat_template without additions to the processor."
            )
        self.end = encode(self.tokenizer, end)[:1]  # without the line break after it
        if not self.end:
            raise ValueError("the chat template writes nothing behind an answer: the model could not learn to stop.")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids`, `attention_mask` and `labels` (B, S), -100 outside the targets, and all audio heard."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "padding_side": "left"}
        inputs = dict(self.processor.apply_chat_template([sample.messages for sample in samples], **options))
        prompts, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        rows, labels = [], []
        for sample, prompt, real in zip(samples, prompts, mask, strict=True):
            prompt = prompt[real.bool()]
            target = encode_answer(sample.target, self.tokenizer, self.processor.chat_template)
            target = torch.tensor(target + (self.end if sample.complete else []))
            rows.append(torch.cat([prompt, target]))
            labels.append(torch.cat([torch.full_like(prompt, -100), target]))
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        if self.with_prompts:
            batch |= {"prompt_input_ids": prompts, "prompt_attention_mask": mask}
        return batch | inputs


@dataclass(frozen=True)
class Item:
    """A training sample with its row and the sources of its branches."""

    sample: Sample
    row: Row
    sources: Sources
    teacher: Teacher | None = None  # the frozen LLM's most likely tokens at each token of the target


class TrainingCollator(DualSLMCollator):
    """Collates items, with the encoder's features from the cache; `captions` adds the labels of stage 0's loss."""

    def __init__(
        self, processor: DualSLMProcessor, store: FeatureStore, captions: bool = False, with_prompts: bool = False
    ):
        super().__init__(processor, with_prompts)
        self.store, self.captions = store, captions

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """As [`DualSLMCollator`], but with the inputs of `adapt_cached` instead of the log-mel.

        Also `task_ids` (B,), `caption_labels` (A, slots or attributes) if asked for, and `teacher_ids` and
        `teacher_log_probs` (targets, k) if an item has a teacher.
        """
        rows = [item.row for item in items]
        states, lengths = self.store.batch(rows)
        samples = [
            item.sample.with_spoken(
                path=None, num_frames=n, paralinguistic=item.sources[0], linguistic=item.sources[1]
            )
            for item, n in zip(items, lengths.tolist(), strict=True)
        ]
        batch = super().__call__(samples) | {"audio_states": states, "audio_lengths": lengths}
        batch["audio_branches"] = torch.tensor([[s == "speech" for s in item.sources[:2]] for item in items]).long()
        batch["audio_trained"] = torch.tensor([item.sources[2:] for item in items])
        batch["task_ids"] = torch.tensor([TASKS.index(item.sample.task) for item in items])
        if self.store.pools:
            batch["audio_pooled"] = torch.stack([self.store.get(row, "pooled") for row in rows])
        if self.captions:
            targets_of = label_targets if self.processor.caption_slots is None else caption_targets
            batch["caption_labels"] = targets_of(rows, self.processor)
        counts = (batch["labels"] != -100).sum(1).tolist()
        return batch | _teachers([item.teacher for item in items], counts)


def _teachers(teachers: Sequence[Teacher | None], counts: list[int]) -> dict[str, torch.Tensor]:
    """The teachers' tokens at so many targets of each item; without a teacher the log-probabilities are -inf."""
    known = next((teacher for teacher in teachers if teacher is not None), None)
    if known is None:
        return {}
    width = known[0].shape[1]
    parts = [
        teacher or (known[0].new_zeros(count, width), known[1].new_full((count, width), -torch.inf))
        for teacher, count in zip(teachers, counts, strict=True)
    ]
    ids, log_probs = zip(*parts, strict=True)
    return {"teacher_ids": torch.cat(ids), "teacher_log_probs": torch.cat(log_probs)}
