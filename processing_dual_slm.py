"""Processor and pipeline of a dual-adapter speech language model."""

import re
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, GenerationConfig, ProcessorMixin
from transformers.pipelines.any_to_any import AnyToAnyPipeline

from .audio_dual_slm import count_frames, extract_log_mel, extract_waveforms, load_audio, pad_frames
from .backbones_dual_slm import HUB_OPTIONS
from .captions_dual_slm import CaptionSlots
from .conversation_dual_slm import DualSLMConversation
from .hearing_dual_slm import HearingMixin
from .porting_dual_slm import plan_port
from .templates_dual_slm import fit_messages
from .turns_dual_slm import AUDIO_MARK, SOURCES, SpokenTurn

# Fields that a processor has in common with its model's config.
SHARED_FIELDS = (
    "num_paralinguistic_tokens",
    "linguistic_adapter_type",
    "linguistic_downsample_rate",
    "encoder_padding",
    "caption_template",
    "attribute_labels",
    "attribute_questions",
    "caption_origin",
)


class DualSLMProcessor(HearingMixin, ProcessorMixin):
    r"""Chat messages with speech -> inputs of [`DualSLMForConditionalGeneration`].

    A spoken turn is a content part `{"type": "audio", "audio" | "path" | "url": ...}` of a chat message. It may have
    `sampling_rate`, `transcript`, `caption`, and the source of each branch: `paralinguistic: speech | caption | none` and
    `linguistic: speech | transcript | none`. `caption` and `transcript` put that text where the branch's embeddings
    would be. Both sources default to `speech`. A checkpoint without a linguistic adapter defaults to `transcript` where
    there is one, else to `none`.

    Args:
        feature_extractor: the encoder's, a [`WhisperFeatureExtractor`] or one of waveforms (`Wav2Vec2FeatureExtractor`).
        tokenizer: the LLM's. The two placeholder tokens are added after its last id.
        chat_template (`str`, *optional*): replaces the tokenizer's own template.
        num_paralinguistic_tokens, linguistic_adapter_type, linguistic_downsample_rate, encoder_padding, caption_template,
            attribute_labels, attribute_questions, caption_origin: as in [`DualSLMConfig`].
        attribute_temperatures (`dict[str, float]`, *optional*): attribute -> divisor of its log-probabilities, fitted on
            validation speakers by `dual-slm calibrate`. Default: 1.
        audio_conv (`list[list[int]]`, *optional*): kernels and strides of an encoder of waveforms, which give the number
            of frames of a clip.
        paralinguistic_token, linguistic_token (`str`): the placeholders.

    Raises:
        ValueError: the caption template takes another number of tokens than `num_paralinguistic_tokens`.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        num_paralinguistic_tokens: int = 16,
        linguistic_adapter_type: str = "concat",
        linguistic_downsample_rate: int = 5,
        encoder_padding: str = "max_length",
        caption_template: str | None = None,
        attribute_labels: dict[str, list[str]] | None = None,
        attribute_questions: dict[str, dict[str, str]] | None = None,
        attribute_temperatures: dict[str, float] | None = None,
        audio_conv: list[list[int]] | None = None,
        caption_origin: dict | None = None,
        paralinguistic_token: str = "<|paralinguistic|>",
        linguistic_token: str = "<|linguistic|>",
    ):
        self.num_paralinguistic_tokens = num_paralinguistic_tokens
        self.linguistic_downsample_rate = linguistic_downsample_rate
        self.encoder_padding = encoder_padding
        self.caption_template = caption_template
        self.attribute_labels = attribute_labels
        self.attribute_questions = attribute_questions
        self.attribute_temperatures = attribute_temperatures
        self.linguistic_adapter_type = linguistic_adapter_type
        self.audio_conv = audio_conv
        self.caption_origin = caption_origin
        self.paralinguistic_token = paralinguistic_token
        self.linguistic_token = linguistic_token
        self.caption_slots = None
        if tokenizer is not None:
            if tokenizer.pad_token is None:  # Llama 3; padding is masked anyway
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.add_tokens([paralinguistic_token, linguistic_token], special_tokens=True)
            self.paralinguistic_token_id = tokenizer.convert_tokens_to_ids(paralinguistic_token)
            self.linguistic_token_id = tokenizer.convert_tokens_to_ids(linguistic_token)
            if caption_template is not None:
                self.caption_slots = CaptionSlots(tokenizer, caption_template, attribute_labels or {})
                if self.caption_slots.num_slots != num_paralinguistic_tokens:
                    raise ValueError(
                        f"the caption template takes {self.caption_slots.num_slots} tokens of this tokenizer, but "
                        f"num_paralinguistic_tokens is {num_paralinguistic_tokens}."
                    )
                if caption_origin is not None:  # the adapter's logits are over the tokens of its first LLM
                    self.caption_slots = CaptionSlots.from_layout(caption_origin["slots"], attribute_labels or {})
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(cls, config, feature_extractor, tokenizer) -> "DualSLMProcessor":
        """The processor that belongs to a model's config.

        Args:
            config ([`DualSLMConfig`]): the model's.
            feature_extractor: the speech encoder's.
            tokenizer: the LLM's own, unchanged.

        Raises:
            ValueError: this tokenizer gives the placeholders other ids than the config says.
        """
        values = {name: getattr(config, name) for name in SHARED_FIELDS}
        if hasattr(config.audio_config, "conv_kernel"):
            values["audio_conv"] = [list(config.audio_config.conv_kernel), list(config.audio_config.conv_stride)]
        processor = cls(feature_extractor, tokenizer, **values)
        for branch in ("paralinguistic_token_id", "linguistic_token_id"):
            if getattr(processor, branch) != getattr(config, branch):
                raise ValueError(
                    f"{branch} is {getattr(config, branch)} in the config but {getattr(processor, branch)} in this "
                    f"tokenizer ({len(tokenizer)} tokens): it is not the tokenizer of {config.text_model_id}."
                )
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, text_model_id: str | None = None, **kwargs):
        """Loads a processor.

        Args:
            text_model_id: as for the model. An LLM with another fingerprint than the checkpoint's brings its own tokenizer
                and chat template, and the caption is spelled in its tokens.
            kwargs: `revision`, `subfolder` and Hub options.
        """
        name = pretrained_model_name_or_path
        processor = super().from_pretrained(name, **kwargs)
        hub_kwargs = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        places = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key) is not None}
        port = None if text_model_id is None else plan_port(name, None, text_model_id, hub_kwargs, places)
        if port is None:
            return processor
        ported = cls.from_config(port.config, processor.feature_extractor, port.tokenizer)
        ported.attribute_temperatures = None if processor.attribute_questions else processor.attribute_temperatures
        return ported

    @property
    def model_input_names(self) -> list[str]:
        audio = ["input_features", "input_features_mask", "audio_num_chunks", "audio_branches"]
        return ["input_ids", "attention_mask", *audio]

    # ---- audio -----------------------------------------------------------------------------------------------------

    @property
    def sampling_rate(self) -> int:
        return self.feature_extractor.sampling_rate

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of a clip of so many samples, all its chunks together."""
        return count_frames(num_samples, self.feature_extractor, self.audio_conv)

    def num_linguistic_tokens(self, num_samples: int) -> int:
        """Linguistic placeholders of a clip of so many samples: one for k encoder frames."""
        return -(-self.num_frames(num_samples) // self.linguistic_downsample_rate)

    def extract_features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the encoder reads of clips of any length, cut into chunks of at most 30 s.

        Args:
            clips: mono float32 samples at `sampling_rate` each, as `load_audio` gives.

        Returns:
            `input_features` (K, mel bins, F) log-mel, or (K, samples) waveforms where the encoder reads these;
            `input_features_mask` (K, F) or (K, samples); `audio_num_chunks` (A,).
        """
        if self.audio_conv is not None:
            return extract_waveforms(clips, self.feature_extractor)
        return extract_log_mel(clips, self.feature_extractor, self.encoder_padding == "max_length")

    # ---- text ------------------------------------------------------------------------------------------------------

    def caption(self, attributes: dict[str, str]) -> str:
        """The caption that the paralinguistic tokens of this checkpoint spell for these attributes."""
        if self.caption_template is None:
            raise ValueError("this checkpoint has no caption_template: write the caption yourself.")
        missing = set(self.attribute_labels or ()) - set(attributes)
        if missing:
            raise ValueError(f"the caption template needs {sorted(missing)} too.")
        return self.caption_template.format(**attributes)

    def _read_turn(self, part) -> SpokenTurn:
        """Checks a spoken turn, and loads its clip if a branch hears it."""
        turn = SpokenTurn.from_part(part, self.linguistic_adapter_type != "none")
        for text in turn.texts:
            self._refuse_placeholders(text)
        # A turn with num_frames has the encoder's features already: training caches them for the model.
        if turn.hears and turn.num_frames is None:
            turn.samples = load_audio(turn.clip, turn.sampling_rate, self.sampling_rate)
            turn.num_frames = self.num_frames(len(turn.samples))
        return turn

    def _render_turn(self, turn: SpokenTurn) -> str:
        """What stands for a spoken turn in the prompt."""
        text = ""
        if turn.paralinguistic == "speech":
            text = self.paralinguistic_token * self.num_paralinguistic_tokens
        elif turn.paralinguistic == "caption":
            text = (turn.caption or "").strip()
        if turn.linguistic == "speech":
            text += self.linguistic_token * -(-(turn.num_frames or 0) // self.linguistic_downsample_rate)
        elif turn.linguistic == "transcript":
            text += (" " if text else "") + (turn.transcript or "").strip()
        return text

    def _refuse_placeholders(self, text: str) -> None:
        for token in (AUDIO_MARK, self.paralinguistic_token, self.linguistic_token):
            if token in text:
                raise ValueError(
                    f"the text contains {token}, which is reserved for audio. Remove it from {text[:80]!r}."
                )

    def _flatten(self, message: dict) -> tuple[str, list[dict]]:
        """A message's content as one string, with `<|audio|>` for each of its spoken parts, and these parts."""
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        pieces, audio = [], []
        for part in content:
            if part.get("type") == "text":
                self._refuse_placeholders(part["text"])
                pieces.append(part["text"])
            elif part.get("type") == "audio":
                pieces.append(AUDIO_MARK)
                audio.append(part)
            else:
                raise ValueError(f"a content part of type {part.get('type')!r}; this model takes 'text' and 'audio'.")
        return "\n".join(pieces), audio

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict | None = None,
        padding: bool = True,
        padding_side: str | None = None,
        **template_kwargs,
    ):
        """Renders one conversation, or a batch of them, through the LLM's own chat template, fitted by `fit_messages`.

        Args:
            conversation: messages with `role` and `content`. The content is a string, or a list of parts of type `text`
                and `audio` (see the class).
            add_generation_prompt, continue_final_message, chat_template: as in the tokenizer.
            tokenize: if false, the rendered text is returned, with `<|audio|>` for each spoken turn.
            return_dict: if false and `tokenize`, only `input_ids` are returned.
            processor_kwargs: arguments of `__call__`.
            template_kwargs: variables of the chat template, and `sampling_rate` of `__call__`.

        Returns:
            `BatchFeature` with the model's inputs.

        Raises:
            ValueError: `truncation` or `max_length` would cut a conversation, or a content part is of another type.
        """
        if template_kwargs.pop("truncation", None) or template_kwargs.pop("max_length", None):
            raise ValueError(
                "a conversation with audio is not cut (truncation, max_length): leave out its first turns."
            )
        if "sampling_rate" in template_kwargs:
            processor_kwargs = {"sampling_rate": template_kwargs.pop("sampling_rate"), **(processor_kwargs or {})}
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        texts, clips, template = [], [], chat_template or self.chat_template
        conversations: list[Any] = conversation if batched else [conversation]
        for messages in conversations:
            flat = []
            for message in fit_messages(messages, self.tokenizer, template):
                content, audio = self._flatten(message)
                clips += audio
                flat.append({**message, "content": content})
            texts.append(
                self.tokenizer.apply_chat_template(
                    flat,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **template_kwargs,
                )
            )
        if not tokenize:
            return texts if batched else texts[0]
        options = {"padding": padding, "padding_side": padding_side, "return_tensors": return_tensors}
        # The template has written the special tokens already.
        inputs = self(text=texts, audio=clips, add_special_tokens=False, **(options | (processor_kwargs or {})))
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        text: str | list[str],
        audio=None,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Rendered prompts and their audio -> model inputs.

        Args:
            text: prompts with one `<|audio|>` for each clip.
            audio: the clips of all prompts in order: any audio of `load_audio`, or content parts of type `audio`.
            sampling_rate: rate of arrays that come without one, in Hz. Default: the model's.
            padding, add_special_tokens: as in the tokenizer.
            padding_side: "left" (default, as generation wants it) or "right".
            return_tensors: "pt" only.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (B, S). If a branch hears audio, also `input_features`,
            `input_features_mask`, `audio_num_chunks` (see `extract_features`) and `audio_branches` (A, 2).

        Raises:
            ValueError: the marks and the clips are not equally many, or a spoken turn is refused.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: this processor makes PyTorch tensors ('pt').")
        texts = [text] if isinstance(text, str) else list(text)
        clips = [] if audio is None else audio if isinstance(audio, list) else [audio]
        found = sum(prompt.count(AUDIO_MARK) for prompt in texts)
        if found != len(clips):
            raise ValueError(f"the text has {found} {AUDIO_MARK} marks but there are {len(clips)} clips.")
        if sampling_rate is not None:
            clips = [_with_rate(clip, sampling_rate) for clip in clips]
        turns = [self._read_turn(clip) for clip in clips]
        rendered = iter([self._render_turn(turn) for turn in turns])
        prompts = [re.sub(re.escape(AUDIO_MARK), lambda _: next(rendered), prompt) for prompt in texts]
        data: dict[str, Any] = dict(
            self.tokenizer(
                prompts,
                padding=padding,
                padding_side=padding_side or "left",
                add_special_tokens=add_special_tokens,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
        data.pop("token_type_ids", None)
        heard = [turn for turn in turns if turn.samples is not None]
        if heard:
            data |= self.extract_features([turn.samples for turn in heard if turn.samples is not None])
            branches = [[getattr(turn, branch) == "speech" for branch in SOURCES] for turn in heard]
            data["audio_branches"] = torch.tensor(branches).long()
        return BatchFeature(data)

    # ---- output ----------------------------------------------------------------------------------------------------

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def conversation(self, model, system: str | None = None, transcribe=None, **generation) -> DualSLMConversation:
        """A conversation with the model of this checkpoint, see [`DualSLMConversation`]."""
        return DualSLMConversation(model, self, system, transcribe, **generation)


def _with_rate(clip, sampling_rate: int):
    """A clip with the rate that holds where it brings none."""
    if isinstance(clip, tuple):
        return clip
    known = clip if isinstance(clip, dict) else {"audio": clip}
    return {**known, "sampling_rate": known.get("sampling_rate") or sampling_rate}


class AudioTextToTextPipeline(AnyToAnyPipeline):
    """`pipeline("audio-text-to-text")`: chats with spoken turns in, text out.

    Any `batch_size` works, whatever the lengths and numbers of clips. `AnyToAnyPipeline` would stack every input along
    the rows, but audio has one row for each chunk of each clip.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.feature_extractor = None  # the stock batching would compare its padding side with the tokenizer's
        # pipeline() has replaced names by classes, which no config.json can hold.
        for task in getattr(self.model.config, "custom_pipelines", {}).values():
            task["pt"] = [getattr(entry, "__name__", entry) for entry in task["pt"]]

    def check_model_type(self, supported_models) -> None:
        pass  # a checkpoint registers this class itself, for its own model

    def _sanitize_parameters(self, generate_kwargs: dict | None = None, **options) -> tuple[dict, dict, dict]:
        # Bare options of generation would end in the chat template, which ignores them.
        known = vars(GenerationConfig()).keys() - {"max_new_tokens"}
        bare = {name: options.pop(name) for name in known & options.keys()}
        return super()._sanitize_parameters(generate_kwargs={**bare, **(generate_kwargs or {})}, **options)

    def preprocess(self, inputs=None, **options) -> dict:
        if isinstance(inputs, dict):  # text that is no chat comes with images=None and videos=None
            inputs = {name: value for name, value in inputs.items() if value is not None}
        return {"item": super().preprocess(inputs, **options)}  # no tensor, so that stock batching makes a plain list

    def _forward(self, model_inputs, **options) -> dict:
        items = model_inputs["item"]
        if not isinstance(items, list):
            return super()._forward(items, **options)
        width = max(item["input_ids"].shape[1] for item in items)
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}  # pyright: ignore
        batch = {
            name: torch.cat(
                [torch.nn.functional.pad(i[name], (width - i[name].shape[1], 0), value=value) for i in items]
            )
            for name, value in fill.items()
        }
        heard = [item for item in items if "input_features" in item]
        if heard:
            frames = max(item["input_features"].shape[-1] for item in heard)
            for name in ("input_features", "input_features_mask"):
                batch[name] = torch.cat([pad_frames(item[name], frames) for item in heard])
            for name in ("audio_num_chunks", "audio_branches"):
                batch[name] = torch.cat([item[name] for item in heard])
        return super()._forward({**batch, "text": [item["text"] for item in items]}, **options)


DualSLMProcessor.register_for_auto_class()

__all__ = ["AudioTextToTextPipeline", "DualSLMProcessor"]
