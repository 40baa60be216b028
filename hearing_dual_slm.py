"""What a checkpoint hears, read out of its model: words, attributes, and the probability of given answers."""

from typing import Any

import torch

from .captions_dual_slm import CaptionSlots
from .configuration_dual_slm import plain_text
from .templates_dual_slm import encode_answer
from .tokens_dual_slm import encode_pieces


class HearingMixin:
    """The part of [`DualSLMProcessor`] that reads the model's outputs."""

    tokenizer: Any
    apply_chat_template: Any
    chat_template: str | None
    model_input_names: list[str]
    linguistic_adapter_type: str
    caption_slots: CaptionSlots | None
    attribute_labels: dict[str, list[str]] | None
    attribute_questions: dict[str, dict[str, str]] | None
    attribute_temperatures: dict[str, float] | None

    @torch.no_grad()
    def choose(self, model, conversation: list[dict], answers: list[str], audio_features=None) -> list[float]:
        """Probability of each of several answers to a conversation.

        Args:
            model ([`DualSLMForConditionalGeneration`]): of this checkpoint.
            conversation: chat messages, the last one the user's.
            answers: what the assistant might say, for example a sentence for each label.
            audio_features: of the conversation's clips; without them the clips are encoded.

        Returns:
            Softmax over the answers of the summed log-probabilities of their tokens.
        """
        inputs = self.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
        device = model.get_input_embeddings().weight.device
        audio = {name: inputs[name] for name in self.model_input_names[2:] if name in inputs}
        if audio_features is None and audio:
            audio_features = model.get_audio_features(**audio)
        rows = [torch.tensor(encode_answer(a, self.tokenizer, self.chat_template)) for a in answers]
        prompt = inputs["input_ids"].to(device)
        return model.answer_log_probs(prompt, rows, audio_features=audio_features).softmax(0).tolist()

    def ask_attributes(self, model, part: dict, audio_features=None) -> dict[str, dict[str, float]] | None:
        """Asks the LLM the checkpoint's `attribute_questions`: attribute -> probability of each label.

        Args:
            part: the spoken content part.
            audio_features: of the clip; without them it is encoded.
        """
        if not self.attribute_questions:
            return None
        found = {}
        for name, question in self.attribute_questions.items():
            labels = (self.attribute_labels or {})[name]
            chat = [{"role": "user", "content": [part, {"type": "text", "text": self.question(name)}]}]
            answers = [question["answer"].format(label=label) for label in labels]
            found[name] = dict(zip(labels, self.choose(model, chat, answers, audio_features), strict=True))
        return self._calibrate(found)

    def question(self, name: str) -> str:
        """The question about an attribute that the checkpoint was trained on."""
        questions, labels = self.attribute_questions or {}, self.attribute_labels or {}
        return questions[name]["instruction"].format(choices=", ".join(labels[name]))

    def _calibrate(self, attributes: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        result = {}
        for name, found in attributes.items():
            powers = torch.tensor(list(found.values())) ** (1 / (self.attribute_temperatures or {}).get(name, 1.0))
            result[name] = dict(zip(found, (powers / powers.sum()).tolist(), strict=True))
        return result

    def decode_audio(self, features) -> list[dict]:
        """What was heard in each clip when both branches listen.

        Args:
            features ([`DualSLMAudioFeatures`]): of clips whose branches are both `speech`.

        Returns:
            For each clip `heard`, the words (`None` without character CTC), and `attributes`, attribute -> probability of
            each label (`None` where the adapter spells no captions).
        """
        count = max(0 if x is None else len(x) for x in (features.paralinguistic_embeds, features.linguistic_lengths))
        heard, attributes = [None] * count, [None] * count
        if features.linguistic_token_ids is not None:
            tokens = features.linguistic_token_ids.split(features.linguistic_lengths.tolist())
            options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            heard = [self.tokenizer.decode(ids, **options).strip() for ids in tokens]
        if features.paralinguistic_logits is not None and self.caption_slots is not None:
            found = [self.caption_slots.read(logits) for logits in features.paralinguistic_logits]
            attributes = [self._calibrate(each) for each in found]
        return [{"heard": h, "attributes": a} for h, a in zip(heard, attributes, strict=True)]

    def set_hotwords(self, model, words: list[str]) -> None:
        """Names and terms that are expected in what is said next. They replace earlier ones; an empty list clears them.

        Args:
            model ([`DualSLMForConditionalGeneration`]): of the same checkpoint, with character CTC.
            words: words or phrases.

        Raises:
            ValueError: the checkpoint has no character CTC, or a word has a letter that it does not write.
        """
        if self.linguistic_adapter_type != "letters":
            raise ValueError(
                f"hotwords need a checkpoint with linguistic_adapter_type: letters, and this one's is "
                f"{self.linguistic_adapter_type}."
            )
        adapter, hotwords = model.linguistic_adapter, {}
        for word in plain_text(" ".join(words)).split():
            word = word.strip("'\".,;:!?")
            if not word or not set(adapter.alphabet[1:]).issuperset(word):
                raise ValueError(f"the hotword {word!r} is not in the letters {adapter.alphabet!r}.")
            (hotwords[word],) = encode_pieces(self.tokenizer, [f" {word}"])
        adapter.hotwords = hotwords
