"""Samples -> one padded batch: prompts through the processor, targets behind them, a loss on the targets alone."""

import torch

from ..processing_dual_slm import DualSLMProcessor
from .tasks import Sample


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
        self.end = self._encode(whole[len(prompt) + len("Answer.") :])[
            :1
        ]  # what ends a turn, without a line break behind
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
