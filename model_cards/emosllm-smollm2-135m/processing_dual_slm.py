"""Processor, conversation and pipeline of a dual-adapter speech language model."""

import io
import re
import unicodedata
import urllib.request
from collections.abc import Iterator
from threading import Event, Thread

import numpy as np
import torch
from transformers import (
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    ProcessorMixin,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.pipelines.any_to_any import AnyToAnyPipeline
from transformers.utils import logging

try:
    import soundfile
except ImportError:  # arrays at 16 kHz work without it
    soundfile = None
try:
    import soxr
except ImportError:
    soxr = None

logger = logging.get_logger(__name__)

SOURCES = {"paralinguistic": ("speech", "caption", "none"), "linguistic": ("speech", "transcript", "none")}
CHUNK_SECONDS = 30
MINIMUM_SAMPLES = 400  # what the convolutions of an encoder of waveforms need for one frame
_AUDIO = "<|audio|>"


# --------------------------------------------------------------------------------------------------------------------
# Audio
# --------------------------------------------------------------------------------------------------------------------


def load_audio(audio, sampling_rate: int | None = None, target_rate: int = 16_000) -> np.ndarray:
    """Any form of audio -> mono float32 samples at `target_rate`.

    Args:
        audio: a path or URL of a file that libsndfile reads (WAV, FLAC, Ogg, MP3 ...), its bytes or an open file; an array
            or tensor of samples, of shape (samples,), (samples, channels) or (channels, samples), float in [-1, 1] or
            integers of full scale; a pair (samples, rate); or a dict with "array" and "sampling_rate" (datasets).
        sampling_rate: rate of an array in Hz. Default: `target_rate`.

    Raises:
        ValueError: empty audio, NaN or infinite samples, floats that are integers in disguise, more than 8 channels, a
            rate out of reason, or a file that is not audio.
        FileNotFoundError: no such file.
    """
    if isinstance(audio, dict):
        if "array" not in audio:
            raise ValueError(f"an audio dict needs 'array' and 'sampling_rate', got the keys {sorted(audio)}.")
        audio, sampling_rate = audio["array"], audio.get("sampling_rate", sampling_rate)
    elif isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0:
        audio, sampling_rate = audio
    name = "audio"
    if hasattr(audio, "__fspath__"):
        audio = audio.__fspath__()
    if isinstance(audio, (bytes, bytearray)):
        audio = io.BytesIO(audio)
    if isinstance(audio, str) or hasattr(audio, "read"):
        name = "audio" if not isinstance(audio, str) else audio if len(audio) < 200 else audio[:200] + "…"
        audio, sampling_rate = _read_file(audio)
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu().numpy()
    samples = np.asarray(audio)
    if samples.dtype == object or samples.dtype.kind not in "fiub":
        raise ValueError(f"{name}: samples of type {samples.dtype} are not audio; give floats in [-1, 1] or integers.")
    if samples.ndim == 2:
        samples = samples if samples.shape[0] >= samples.shape[1] else samples.T
        if samples.shape[1] > 8:
            raise ValueError(f"{name}: an array of shape {np.shape(audio)} is neither mono nor (samples, channels).")
    elif samples.ndim != 1:
        raise ValueError(f"{name}: an array of shape {samples.shape} is not one clip; pass clips one by one.")
    if samples.size == 0:
        raise ValueError(f"{name}: there are no samples. Leave the turn out, or write it as text.")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind in "iu":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min or -np.iinfo(samples.dtype).max)
    samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    bad = int((~np.isfinite(samples)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {samples.size} samples are NaN or infinite. Repair the recording.")
    peak = float(np.abs(samples).max())
    if peak > 16:
        raise ValueError(f"{name}: float samples peak at {peak:.0f}, not 1. Divide by full scale (32768 for 16 bit).")
    rate = target_rate if sampling_rate is None else sampling_rate
    if not 1_000 <= rate <= 768_000:
        raise ValueError(f"{name}: a sampling rate of {rate} Hz is out of reason (1,000 to 768,000).")
    if rate != target_rate:
        if soxr is None:
            raise ImportError(
                f"{name} has {rate} Hz and the model needs {target_rate}: `pip install soxr` to resample."
            )
        samples = soxr.resample(samples, rate, target_rate)
        if samples.size == 0:
            samples = np.zeros(1, np.float32)
    return samples


def _read_file(source) -> tuple[np.ndarray, int]:
    if soundfile is None:
        raise ImportError("reading audio files needs soundfile: `pip install soundfile`.")
    file = source
    if isinstance(source, str) and re.match(r"https?://", source):
        request = urllib.request.Request(source, headers={"User-Agent": "dual-slm"})
        with urllib.request.urlopen(request, timeout=60) as response:
            file = io.BytesIO(response.read())
    try:
        return soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if isinstance(file, str):
            open(file, "rb").close()  # a missing or unreadable file speaks for itself
        raise ValueError(
            f"{source} is not audio that libsndfile reads ({error.error_string.strip()}). Convert it first, for example "
            f"`ffmpeg -i {source} clip.wav`."
        ) from None


# --------------------------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------------------------


class CaptionSlots:
    """How a caption template is spelled over a fixed number of the LLM's tokens, one for each paralinguistic embedding.

    A field takes as many slots as its longest label has tokens; a shorter label is filled up with the token of a space.

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
        """Index into `token_ids` for each slot; slots of unknown attributes are `ignore_index`."""
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
        """(N, V) logits over `token_ids` of one clip -> probability of each label of each attribute."""
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


# --------------------------------------------------------------------------------------------------------------------
# Processor
# --------------------------------------------------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """As letters are heard: in lower case, accents in one piece with their letters, one kind of apostrophe, no hyphens."""
    return unicodedata.normalize("NFC", text.lower()).replace("’", "'").replace("-", " ")


class DualSLMProcessor(ProcessorMixin):
    r"""Chat messages with speech -> what [`DualSLMForConditionalGeneration`] takes.

    A spoken turn is a content part `{"type": "audio", "audio" | "path" | "url": ...}` of a chat message, optionally with
    `sampling_rate`, `transcript`, `caption`, and the source of each branch, `paralinguistic: speech | caption | none`
    and `linguistic: speech | transcript | none`. `caption` and `transcript` put that text where the branch's
    embeddings would be. The default of both is `speech`; of a checkpoint without a linguistic adapter, where the words come
    as text, the linguistic one's is the `transcript` if there is one, else `none`.

    Args:
        feature_extractor: the encoder's, a [`WhisperFeatureExtractor`] or one of waveforms (`Wav2Vec2FeatureExtractor`).
        tokenizer: the LLM's; the two placeholder tokens are added after its last id.
        chat_template (`str`, *optional*): another template than the tokenizer's own.
        num_paralinguistic_tokens, linguistic_adapter_type, linguistic_downsample_rate, encoder_padding, caption_template,
            attribute_labels, attribute_questions: as in [`DualSLMConfig`].
        attribute_temperatures (`dict[str, float]`, *optional*): attribute -> what the logarithms of its probabilities are
            divided by, fitted on validation speakers by `dual-slm calibrate`. Default: 1.
        audio_conv (`list[list[int]]`, *optional*): kernels and strides of an encoder of waveforms, which say how many
            frames a clip has.
        paralinguistic_token, linguistic_token (`str`): the placeholders.
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
        self.paralinguistic_token = paralinguistic_token
        self.linguistic_token = linguistic_token
        self.caption_slots = None
        if tokenizer is not None:
            if tokenizer.pad_token is None:  # Llama 3: what fills up a batch is masked anyway
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.add_tokens([paralinguistic_token, linguistic_token], special_tokens=True)
            self.paralinguistic_token_id = tokenizer.convert_tokens_to_ids(paralinguistic_token)
            self.linguistic_token_id = tokenizer.convert_tokens_to_ids(linguistic_token)
            if caption_template is not None:
                self.caption_slots = CaptionSlots(tokenizer, caption_template, attribute_labels)
                if self.caption_slots.num_slots != num_paralinguistic_tokens:
                    raise ValueError(
                        f"the caption template takes {self.caption_slots.num_slots} tokens of this tokenizer, but "
                        f"num_paralinguistic_tokens is {num_paralinguistic_tokens}."
                    )
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(cls, config, feature_extractor, tokenizer) -> "DualSLMProcessor":
        """The processor that belongs to a model's config.

        Args:
            config ([`DualSLMConfig`]): of the model.
            feature_extractor: the speech encoder's.
            tokenizer: the LLM's own, unchanged.

        Raises:
            ValueError: the placeholders get other ids in this tokenizer than the config says.
        """
        names = ("num_paralinguistic_tokens", "linguistic_downsample_rate", "encoder_padding")
        names += ("caption_template", "attribute_labels", "attribute_questions", "linguistic_adapter_type")
        values = {name: getattr(config, name) for name in names}
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
        chunk = CHUNK_SECONDS * self.sampling_rate
        frames = 0
        for start in range(0, num_samples, chunk):
            size = min(chunk, num_samples - start)
            if self.audio_conv is None:
                mel = -(-size // self.feature_extractor.hop_length)
                frames += (mel + 1) // 2
                continue
            size = max(size, MINIMUM_SAMPLES)
            for kernel, stride in zip(*self.audio_conv, strict=True):
                size = (size - kernel) // stride + 1
            frames += size
        return frames

    def num_linguistic_tokens(self, num_samples: int) -> int:
        """Placeholders of a clip of so many samples: k encoder frames to one."""
        return -(-self.num_frames(num_samples) // self.linguistic_downsample_rate)

    def extract_features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """Log-mel, or waveforms where the encoder reads these, of clips of any length, cut into chunks of at most 30 s.

        Args:
            clips: mono float32 samples at `sampling_rate` each, as `load_audio` gives.

        Returns:
            `input_features` (K, mel bins, F), `input_features_mask` (K, F) by the real number of samples, and
            `audio_num_chunks` (A,). Of waveforms (K, samples) both.
        """
        if self.audio_conv is not None:
            return self._extract_waveforms(clips)
        extractor, size = self.feature_extractor, CHUNK_SECONDS * self.sampling_rate
        features, lengths, counts = [], [], []
        for clip in clips:
            chunks = [clip[start : start + size] for start in range(0, len(clip), size)]
            counts.append(len(chunks))
            for chunk in chunks:
                frames = -(-len(chunk) // extractor.hop_length)
                # Zeros behind the chunk keep the reflection at the end out of its last frames, as in a 30 s window.
                padded = size if self.encoder_padding == "max_length" else (frames + 3) * extractor.hop_length
                mel = extractor(
                    chunk,
                    sampling_rate=self.sampling_rate,
                    padding="max_length",
                    max_length=padded,
                    truncation=False,
                    return_tensors="pt",
                ).input_features[0]
                features.append(mel if self.encoder_padding == "max_length" else mel[:, :frames])
                lengths.append(frames)
        longest = max(feature.shape[1] for feature in features)
        features = [_pad_frames(feature, longest) for feature in features]
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return {
            "input_features": torch.stack(features),
            "input_features_mask": mask.long(),
            "audio_num_chunks": torch.tensor(counts),
        }

    def _extract_waveforms(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        size, waves, counts = CHUNK_SECONDS * self.sampling_rate, [], []
        for clip in clips:
            chunks = [clip[start : start + size] for start in range(0, len(clip), size)]
            counts.append(len(chunks))
            for chunk in chunks:
                chunk = np.pad(chunk, (0, max(0, MINIMUM_SAMPLES - len(chunk))))
                options = {"sampling_rate": self.sampling_rate, "return_tensors": "pt"}
                waves.append(self.feature_extractor(chunk, **options).input_values[0])
        return {
            "input_features": torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
            "input_features_mask": torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(wave, dtype=torch.long) for wave in waves], batch_first=True
            ),
            "audio_num_chunks": torch.tensor(counts),
        }

    # ---- text ------------------------------------------------------------------------------------------------------

    def caption(self, attributes: dict[str, str]) -> str:
        """The caption that the paralinguistic tokens of this checkpoint spell for these attributes."""
        if self.caption_template is None:
            raise ValueError("this checkpoint has no caption_template: write the caption yourself.")
        missing = set(self.attribute_labels) - set(attributes)
        if missing:
            raise ValueError(f"the caption template needs {sorted(missing)} too.")
        return self.caption_template.format(**attributes)

    def _render_clip(self, part: dict) -> str:
        """What stands in the prompt for one spoken turn."""
        how, what = part["paralinguistic"], part["linguistic"]
        text = ""
        if how == "speech":
            text = self.paralinguistic_token * self.num_paralinguistic_tokens
        elif how == "caption":
            text = part["caption"].strip()
        if what == "speech":
            text += self.linguistic_token * -(-part["num_frames"] // self.linguistic_downsample_rate)
        elif what == "transcript":
            text += (" " if text else "") + part["transcript"].strip()
        return text

    def _read_part(self, part) -> dict:
        """Checks one spoken turn; `audio` becomes samples if a branch hears it, and `num_frames` says how long it is."""
        if not isinstance(part, dict) or "array" in part:
            part = {"audio": part}
        known = {"type", "audio", "path", "url", "sampling_rate", "num_frames", "transcript", "caption", *SOURCES}
        unknown = set(part) - known
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)} in a spoken turn; known are {sorted(known)}.")
        part = dict(part)
        words = "speech"
        if self.linguistic_adapter_type == "none":
            words = "transcript" if (part.get("transcript") or "").strip() else "none"
        for branch, choices in SOURCES.items():
            source = part.setdefault(branch, words if branch == "linguistic" else "speech")
            if source not in choices:
                raise ValueError(f"{branch} is {source!r}; it must be one of {', '.join(choices)}.")
            if branch == "linguistic" and source == "speech" and self.linguistic_adapter_type == "none":
                raise ValueError(
                    "linguistic: speech needs a linguistic adapter, which this checkpoint has not: give a transcript."
                )
            if source in ("caption", "transcript"):
                if not isinstance(part.get(source), str) or not part[source].strip():
                    raise ValueError(f"{branch}: {source} needs the text {source!r} in the same spoken turn.")
                self._refuse_placeholders(part[source])
        part["samples"] = None
        # Whoever gives num_frames has the encoder's features already (training caches them) and gives them to the model.
        if "speech" in (part["paralinguistic"], part["linguistic"]) and part.get("num_frames") is None:
            given = [part[key] for key in ("audio", "path", "url") if part.get(key) is not None]
            if len(given) != 1:
                raise ValueError(f"a spoken turn needs one of 'audio', 'path' and 'url', got {len(given)} of them.")
            part["samples"] = load_audio(given[0], part.get("sampling_rate"), self.sampling_rate)
            part["num_frames"] = self.num_frames(len(part["samples"]))
        return part

    def _refuse_placeholders(self, text: str) -> None:
        for token in (_AUDIO, self.paralinguistic_token, self.linguistic_token):
            if token in text:
                raise ValueError(
                    f"the text contains {token}, which is reserved for audio. Remove it from {text[:80]!r}."
                )

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
        """One conversation or a batch of them, in transformers' chat messages, through the LLM's own chat template.

        Args:
            conversation: messages with `role` and `content`; content is a string, or a list of parts of type `text` and
                `audio` (see the class).
            add_generation_prompt, continue_final_message, chat_template: as in the tokenizer.
            tokenize: if false, the rendered text is returned, with `<|audio|>` for each spoken turn.
            return_dict: if false and `tokenize`, only `input_ids` are returned.
            processor_kwargs: arguments of `__call__`.
            template_kwargs: variables of the chat template, and `sampling_rate` of `__call__`.

        Returns:
            `BatchFeature` with what the model takes.

        Raises:
            ValueError: a conversation that is to be cut (`truncation`, `max_length`), or content that is not understood.
        """
        if template_kwargs.pop("truncation", None) or template_kwargs.pop("max_length", None):
            raise ValueError(
                "a conversation with audio is not cut (truncation, max_length): leave out its first turns."
            )
        if "sampling_rate" in template_kwargs:
            processor_kwargs = {"sampling_rate": template_kwargs.pop("sampling_rate"), **(processor_kwargs or {})}
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        texts, clips = [], []
        for messages in conversation if batched else [conversation]:
            flat = []
            for message in messages:
                content, audio = self._flatten(message)
                clips += audio
                flat.append({**message, "content": content})
            texts.append(
                self.tokenizer.apply_chat_template(
                    flat,
                    chat_template=chat_template or self.chat_template,
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
                pieces.append(_AUDIO)
                audio.append(part)
            else:
                raise ValueError(f"a content part of type {part.get('type')!r}; this model takes 'text' and 'audio'.")
        return "\n".join(pieces), audio

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
            audio: the clips of all prompts in order: what `load_audio` takes, or content parts of type `audio`.
            sampling_rate: rate of arrays that come without one, in Hz. Default: the model's.
            padding, add_special_tokens: as in the tokenizer.
            padding_side: "left" (default, as generation wants it) or "right".
            return_tensors: "pt" only.

        Returns:
            `BatchFeature` with `input_ids` (B, S), `attention_mask` (B, S) and, if any branch hears audio,
            `input_features` (K, mel bins, F), `input_features_mask` (K, F), `audio_num_chunks` (A,) and
            `audio_branches` (A, 2).
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: this processor makes PyTorch tensors ('pt').")
        texts = [text] if isinstance(text, str) else list(text)
        if audio is None:
            audio = []
        elif not isinstance(audio, list):
            audio = [audio]
        found = sum(prompt.count(_AUDIO) for prompt in texts)
        if found != len(audio):
            raise ValueError(f"the text has {found} {_AUDIO} marks but there are {len(audio)} clips.")
        if sampling_rate is not None:
            audio = [
                c
                if isinstance(c, tuple)
                else {"sampling_rate": sampling_rate, **(c if isinstance(c, dict) else {"audio": c})}
                for c in audio
            ]
        parts = [self._read_part(clip) for clip in audio]
        rendered = iter([self._render_clip(part) for part in parts])
        prompts = [re.sub(re.escape(_AUDIO), lambda _: next(rendered), prompt) for prompt in texts]
        data = dict(
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
        heard = [part for part in parts if part["samples"] is not None]
        if heard:
            data |= self.extract_features([part["samples"] for part in heard])
            branches = [[part[branch] == "speech" for branch in SOURCES] for part in heard]
            data["audio_branches"] = torch.tensor(branches).long()
        return BatchFeature(data)

    # ---- output ----------------------------------------------------------------------------------------------------

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def conversation(self, model, system: str | None = None, transcribe=None, **generation) -> "DualSLMConversation":
        """A conversation with the model of this checkpoint, see [`DualSLMConversation`]."""
        return DualSLMConversation(model, self, system, transcribe, **generation)

    @torch.no_grad()
    def choose(self, model, conversation: list[dict], answers: list[str], audio_features=None) -> list[float]:
        """Probability of each answer, were the model to give one of them.

        Args:
            model ([`DualSLMForConditionalGeneration`]): of this checkpoint.
            conversation: chat messages, the last one the user's.
            answers: what the assistant might say, for example a sentence for each label.
            audio_features: of the conversation's clips, instead of encoding them.

        Returns:
            Softmax over the answers of the summed log-probabilities of their tokens.
        """
        inputs = self.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
        device = model.get_input_embeddings().weight.device
        audio = {name: inputs[name] for name in self.model_input_names[2:] if name in inputs}
        if audio_features is None and audio:
            audio_features = model.get_audio_features(**audio)
        rows = [self.tokenizer(a, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for a in answers]
        prompt = inputs["input_ids"].to(device)
        return model.answer_log_probs(prompt, rows, audio_features=audio_features).softmax(0).tolist()

    def ask_attributes(self, model, part: dict, audio_features=None) -> dict[str, dict[str, float]] | None:
        """The probability of each label of each attribute, by asking the LLM the checkpoint's `attribute_questions`.

        Args:
            part: the spoken content part.
            audio_features: of the clip, instead of encoding it.
        """
        if not self.attribute_questions:
            return None
        found = {}
        for name, question in self.attribute_questions.items():
            labels = self.attribute_labels[name]
            chat = [{"role": "user", "content": [part, {"type": "text", "text": self.question(name)}]}]
            answers = [question["answer"].format(label=label) for label in labels]
            found[name] = dict(zip(labels, self.choose(model, chat, answers, audio_features), strict=True))
        return self._calibrated(found)

    def question(self, name: str) -> str:
        """What the checkpoint was trained to be asked about an attribute."""
        return self.attribute_questions[name]["instruction"].format(choices=", ".join(self.attribute_labels[name]))

    def _calibrated(self, attributes: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        result = {}
        for name, found in attributes.items():
            powers = torch.tensor(list(found.values())) ** (1 / (self.attribute_temperatures or {}).get(name, 1.0))
            result[name] = dict(zip(found, (powers / powers.sum()).tolist(), strict=True))
        return result

    def set_hotwords(self, model, words: list[str]) -> None:
        """Names and terms that are expected in what is said next, in the place of earlier ones; an empty list is none.

        Args:
            model ([`DualSLMForConditionalGeneration`]): of the same checkpoint, with a linguistic adapter of letters.
            words: words or phrases.

        Raises:
            ValueError: this checkpoint's words are no letters, or a word has others than it writes in.
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
            hotwords[word] = self.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        adapter.hotwords = hotwords

    def decode_audio(self, features) -> list[dict]:
        """What was heard in each clip, both branches listening.

        Args:
            features ([`DualSLMAudioFeatures`]): of clips whose branches are both `speech`.

        Returns:
            For each clip `heard` (text, `None` without CTC) and `attributes`, the probability of each label of each
            attribute (`None` for an adapter that was not taught to spell captions).
        """
        count = max(0 if x is None else len(x) for x in (features.paralinguistic_embeds, features.linguistic_lengths))
        heard, attributes = [None] * count, [None] * count
        if features.linguistic_token_ids is not None:
            tokens = features.linguistic_token_ids.split(features.linguistic_lengths.tolist())
            heard = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
        if features.paralinguistic_logits is not None and self.caption_slots is not None:
            attributes = [
                self._calibrated(self.caption_slots.read(logits)) for logits in features.paralinguistic_logits
            ]
        return [{"heard": h, "attributes": a} for h, a in zip(heard, attributes, strict=True)]


def _pad_frames(feature: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind (..., F) up to `length` frames."""
    return torch.nn.functional.pad(feature, (0, length - feature.shape[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Conversation
# --------------------------------------------------------------------------------------------------------------------


class _Stopped(StoppingCriteria):
    """Ends generation when nobody reads it any more."""

    def __init__(self, left: Event):
        self.left = left

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


class DualSLMConversation:
    """A conversation that encodes each clip once and keeps the LLM's KV cache: a turn costs its own tokens only.

    ```python
    conversation = processor.conversation(model)
    turn = conversation.say(audio="hello.wav")
    turn["heard"], turn["attributes"], turn["reply"]
    for piece in conversation.stream(text="And why is that?"):
        print(piece, end="")
    ```

    Args:
        model ([`DualSLMForConditionalGeneration`]) and processor ([`DualSLMProcessor`]) of one checkpoint.
        system (`str`, *optional*): system prompt.
        transcribe (callable, *optional*): (audio as it was given) -> words, for a checkpoint without a linguistic adapter,
            where a turn has no transcript.
        generation: defaults for `generate`, for example `max_new_tokens` and `do_sample`.
    """

    def __init__(self, model, processor: DualSLMProcessor, system: str | None = None, transcribe=None, **generation):
        self.model, self.processor, self.transcribe = model, processor, transcribe
        self.messages: list[dict] = [{"role": "system", "content": system}] if system else []
        self.generation = {"max_new_tokens": 128, "do_sample": False} | generation
        self._features: list = []  # DualSLMAudioFeatures of the turns
        self._forget()
        self._cached_spoken = False
        self.current_turn: dict | None = None  # what `stream` has heard, before the reply is complete

    def _forget(self) -> None:
        """An empty KV cache: the next turn reads the whole conversation again."""
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds

    def say(self, audio=None, text: str | None = None, **generation) -> dict:
        """One turn of the user, spoken, typed or both; returns `heard`, `attributes` and `reply`.

        Args:
            audio: what `load_audio` takes; an array that is not at the model's rate comes as (samples, rate).
            text: typed, behind the audio.
            generation: for `generate`, in place of the conversation's own.
        """
        turn = self._hear(audio, text)
        return self._answer(turn, generation)

    def stream(self, audio=None, text: str | None = None, **generation) -> Iterator[str]:
        """Like `say`, but yields the reply as it is written; `current_turn` has what was heard at once and
        the whole turn afterwards. Who stops reading stops the reply: the turn then ends with what was written."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        left = Event()
        criteria = [*((self.generation | generation).get("stopping_criteria") or []), _Stopped(left)]
        turn = self._hear(audio, text)

        def run() -> None:
            try:
                self._answer(turn, generation | {"streamer": streamer, "stopping_criteria": criteria})
            except BaseException as error:  # handed to the reader of the stream
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # two threads must not write into one cache
            left.set()
            thread.join()
        if failure:
            raise failure[0]

    def _hear(self, audio, text: str | None) -> dict:
        """Encodes the turn's clip and appends its message. Nothing changes if it is refused."""
        if audio is None and text is None:
            raise ValueError("a turn needs audio, text or both.")
        content, turn = [], {"heard": None, "attributes": None}
        if audio is not None:
            part = (
                audio
                if isinstance(audio, dict) and audio.get("type") == "audio"
                else {"type": "audio", "audio": audio}
            )
            words_as_text = self.processor.linguistic_adapter_type == "none"
            if words_as_text and self.transcribe is not None and not part.get("transcript"):
                given = next(part[key] for key in ("audio", "path", "url") if part.get(key) is not None)
                part = part | {"transcript": self.transcribe(given)}
            inputs = self.processor(text=_AUDIO, audio=[part], add_special_tokens=False)
            features = None
            if "input_features" in inputs:
                names = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches")
                with torch.no_grad():
                    features = self.model.get_audio_features(**{name: inputs[name] for name in names})
                turn |= self.processor.decode_audio(features)[0]
                if self.processor.attribute_questions:  # the LLM's answer, with the words, before the adapter's alone
                    turn["attributes"] = self.processor.ask_attributes(self.model, part, features)
            if words_as_text:
                turn["heard"] = part.get("transcript")
            # The prompt of later turns is rendered from the length alone, not from the samples again.
            content.append(part | {"_rendered": self.processor.decode(inputs["input_ids"][0])})
            self._features.append(features)
        if text is not None:
            content.append({"type": "text", "text": text})
        self.messages.append({"role": "user", "content": content})
        self.current_turn = turn
        return turn

    def _prompt(self) -> torch.Tensor:
        """Token ids of the conversation so far, (1, S), with placeholders."""
        flat = []
        for message in self.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = "\n".join(p["_rendered"] if p["type"] == "audio" else p["text"] for p in content)
            flat.append({"role": message["role"], "content": content})
        return self.processor.tokenizer.apply_chat_template(
            flat,
            chat_template=self.processor.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"].to(self.model.get_input_embeddings().weight.device)

    def _answer(self, turn: dict, generation: dict) -> dict:
        try:
            turn["reply"] = self._generate(self.generation | generation)
        except BaseException:
            message = self.messages.pop()  # as if the turn had not been
            if any(part["type"] == "audio" for part in message["content"]):
                self._features.pop()
            raise
        self.messages.append({"role": "assistant", "content": turn["reply"]})
        return turn

    def _generate(self, options: dict) -> str:
        model, prompt = self.model, self._prompt()
        parts = [part for part in self._features if part is not None]
        audio = type(parts[0]).concatenate(parts) if parts else None
        _, attention_mask = model.merge_audio(prompt, None, audio)
        # The conversation only grows, so equal placeholders at equal places are the same clip's.
        tokens = prompt[0][attention_mask[0].bool()].tolist()
        limit = model.config.get_text_config().max_position_embeddings
        if len(tokens) + options["max_new_tokens"] > limit:
            raise ValueError(
                f"the conversation is {len(tokens)} tokens long; with {options['max_new_tokens']} new ones it passes the "
                f"LLM's {limit}. Start a new conversation."
            )
        named = ("num_beams", "num_return_sequences")
        several = max(options.get(name) or getattr(model.generation_config, name, None) or 1 for name in named) > 1
        spoken = audio is not None or not model.config.lora_only_with_audio
        if several or spoken != self._cached_spoken:  # keys of an LLM without its LoRA are another LLM's
            self._forget()
            self._cached_spoken = spoken
        pairs = enumerate(zip(self._cached, tokens[:-1], strict=False))
        shared = next((n for n, (old, new) in pairs if old != new), min(len(self._cached), len(tokens) - 1))
        try:
            if shared < self._cache.get_seq_length():
                self._cache.crop(shared - self._cache.get_seq_length())
        except (RuntimeError, ValueError):  # a layer that keeps but a window, or a state, has no way back
            self._forget()
        try:
            output = model.generate(input_ids=prompt, audio_features=audio, past_key_values=self._cache, **options)
        except BaseException:
            self._forget()  # cut off amid the layers, some have more keys than others
            raise
        reply = output[0, prompt.shape[1] :]
        # The cache holds the prompt and what was generated, but for the last token, which was never fed back.
        self._cached = (tokens + reply.tolist())[: self._cache.get_seq_length()]
        if several:
            self._forget()  # it holds the beams
        return self.processor.decode(reply, skip_special_tokens=True).strip()


# --------------------------------------------------------------------------------------------------------------------
# Pipeline
# --------------------------------------------------------------------------------------------------------------------


class AudioTextToTextPipeline(AnyToAnyPipeline):
    """`pipeline("audio-text-to-text")`: chats with spoken turns in, text out.

    Any `batch_size` works, whatever the chats' lengths and numbers of clips: `AnyToAnyPipeline` batches by stacking every
    input along the rows, but audio has one row for each chunk of each clip.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.feature_extractor = None  # the stock batching would compare its padding side with the tokenizer's
        # pipeline() has put classes in the place of their names, which no config.json can hold.
        for task in getattr(self.model.config, "custom_pipelines", {}).values():
            task["pt"] = [getattr(entry, "__name__", entry) for entry in task["pt"]]

    def check_model_type(self, supported_models) -> None:
        pass  # this class is registered by the checkpoint itself, for its own model

    def _sanitize_parameters(self, generate_kwargs: dict | None = None, **options) -> tuple[dict, dict, dict]:
        # Bare options of generation would end in the chat template, where nothing reads them.
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
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
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
                batch[name] = torch.cat([_pad_frames(item[name], frames) for item in heard])
            for name in ("audio_num_chunks", "audio_branches"):
                batch[name] = torch.cat([item[name] for item in heard])
        return super()._forward({**batch, "text": [item["text"] for item in items]}, **options)


DualSLMProcessor.register_for_auto_class()

__all__ = ["AudioTextToTextPipeline", "CaptionSlots", "DualSLMConversation", "DualSLMProcessor", "load_audio"]
