"""Samples -> one padded batch: prompts through the processor, targets behind them, a loss on the targets alone."""

from dataclasses import dataclass, replace

import torch

from ..processing_dual_slm import DualSLMProcessor
from .err import Sources
from .features import FeatureStore
from .tasks import TASKS, Sample
from .warm_start import Speller, caption_targets, label_targets, spelled_out


class DualSLMCollator:
    """Renders conversations through the LLM's own chat template.

    The mask of the loss follows the roles: prompt and target are tokenised apart, so nothing is searched for in text.

    Args:
        processor: of the model.
        with_prompts: add left-padded `prompt_input_ids` and `prompt_attention_mask` (B, S) to generate from.

    Raises:
        ValueError: the chat template changes or hides the answer of the assistant (a template that adds "thinking").
    """

    def __init__(self, processor: DualSLMProcessor, with_prompts: bool = False):
        self.processor, self.with_prompts = processor, with_prompts
        self.tokenizer = processor.tokenizer
        ask = [{"role": "user", "content": "Question?"}]
        prompt = processor.apply_chat_template(ask, add_generation_prompt=True)
        whole = processor.apply_chat_template([*ask, {"role": "assistant", "content": "Answer."}])
        if not whole.startswith(prompt + "Answer."):
            raise ValueError(
                f"the chat template writes {whole!r} for a question and its answer, which does not begin with the prompt "
                f"{prompt!r} and the answer. Give a chat_template without additions to the processor."
            )
        behind = self._encode(whole[len(prompt) + len("Answer.") :])
        self.end = behind[:1]  # what ends a turn, without a line break behind
        if not self.end:
            raise ValueError("the chat template writes nothing behind an answer: the model could not learn to stop.")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """
        Returns:
            What the model takes, right-padded: `input_ids`, `attention_mask`, `labels` (B, S), -100 outside the targets,
            and the audio of all spoken turns that a branch hears.
        """
        inputs = dict(
            self.processor.apply_chat_template(
                [sample.messages for sample in samples],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                padding_side="left",
            )
        )
        prompts, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        rows, labels = [], []
        for sample, prompt, real in zip(samples, prompts, mask, strict=True):
            prompt = prompt[real.bool()]
            target = torch.tensor(self._encode(sample.target) + (self.end if sample.complete else []))
            rows.append(torch.cat([prompt, target]))
            labels.append(torch.cat([torch.full_like(prompt, -100), target]))
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }
        if self.with_prompts:
            batch |= {"prompt_input_ids": prompts, "prompt_attention_mask": mask}
        return batch | inputs


@dataclass(frozen=True)
class Item:
    """A sample of training: its row, and where its branches come from. `teacher` holds the frozen LLM's most likely
    tokens at each token of the target, (n, k) ids and log-probabilities."""

    sample: Sample
    row: dict
    sources: Sources
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None


class TrainingCollator(DualSLMCollator):
    """Items -> batch, with the encoder's features from the cache.

    Args:
        processor: of the model.
        store: features of every clip.
        speller: adds `ctc_labels` for a share of the CTC loss.
        captions: adds `caption_labels` for a share of the loss on caption slots, or on the labels that queries say.
        with_prompts: see [`DualSLMCollator`].
    """

    def __init__(
        self,
        processor: DualSLMProcessor,
        store: FeatureStore,
        speller: Speller | None = None,
        captions: bool = False,
        with_prompts: bool = False,
    ):
        super().__init__(processor, with_prompts)
        self.store, self.speller = store, speller
        self.captions = captions

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        """
        Returns:
            As [`DualSLMCollator`], with `audio_states` (A, L, T, C), `audio_lengths` (A,), `audio_pooled`,
            `audio_branches` and `audio_trained` (A, 2) in place of the log-mel, `task_ids` (B,), and where asked for
            `ctc_labels` (A, U) with `ctc_known` (A,), `caption_labels` (A, slots or attributes), `teacher_ids`,
            `teacher_log_probs` (targets, k).
        """
        pooled, branches, samples = [], [], []
        for item in items:
            heard = [source == "speech" for source in item.sources[:2]]
            branches.append(heard)
            if self.store.pools:
                pooled.append(self.store.get(item.row, "pooled"))
            samples.append(self._with_sources(item, self.store.length(item.row)))
        batch = super().__call__(samples)
        states, lengths = self.store.batch([item.row for item in items])
        batch |= {"audio_states": states, "audio_lengths": lengths, "audio_branches": torch.tensor(branches).long()}
        batch["audio_trained"] = torch.tensor([item.sources[2:] for item in items])
        batch["task_ids"] = torch.tensor([TASKS.index(item.sample.task) for item in items])
        if pooled:
            batch["audio_pooled"] = torch.stack(pooled)
        if self.speller is not None:
            said = [item.row["transcript"] or "" for item in items]
            spelled = [torch.tensor(self.speller(text), dtype=torch.long) for text in said]
            batch["ctc_known"] = torch.tensor([bool(text) and spelled_out(text) for text in said])
            batch["ctc_labels"] = torch.nn.utils.rnn.pad_sequence(spelled, batch_first=True, padding_value=-100)
        if self.captions:
            targets_of = label_targets if self.processor.caption_slots is None else caption_targets
            batch["caption_labels"] = targets_of([item.row for item in items], self.processor)
        known = next((item.teacher for item in items if item.teacher is not None), None)
        if known is not None:
            counts = [int((row != -100).sum()) for row in batch["labels"]]
            nothing = (torch.zeros_like(known[0][:1]), torch.full_like(known[1][:1], -torch.inf))
            parts = [
                item.teacher or tuple(part.expand(count, -1) for part in nothing)
                for item, count in zip(items, counts, strict=True)
            ]
            batch["teacher_ids"] = torch.cat([ids for ids, _ in parts])
            batch["teacher_log_probs"] = torch.cat([log_probs for _, log_probs in parts])
        return batch

    @staticmethod
    def _with_sources(item: Item, num_frames: int) -> Sample:
        """The sample whose spoken turn has the drawn sources, and no audio to load."""
        *earlier, turn = item.sample.messages
        content = []
        for part in turn["content"]:
            if part["type"] == "audio":
                sources = {"paralinguistic": item.sources.paralinguistic, "linguistic": item.sources.linguistic}
                part = {key: value for key, value in part.items() if key != "path"} | sources
                part["num_frames"] = num_frames
            content.append(part)
        return replace(item.sample, messages=[*earlier, turn | {"content": content}])
