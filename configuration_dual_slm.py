"""Configuration of a dual-adapter speech language model: every field is declared once, beside its check."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)
import unicodedata
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import AutoConfig, PreTrainedConfig

ALPHABET = " abcdefghijklmnopqrstuvwxyz'"


def plain_text(text: str) -> str:
    """Text as character CTC writes it: lower case, composed accents (NFC), one kind of apostrophe, no hyphens."""
    return unicodedata.normalize("NFC", text.lower()).replace("’", "'").replace("-", " ")


def option(default: Any, help: str) -> Any:
    """A field of the configuration; its `help` becomes its line in the docstring of [`DualSLMConfig`]."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class BackboneConfig:
    """Which frozen backbones a checkpoint belongs to, and where audio enters the prompt."""

    audio_model_id: str | None = option(None, "Speech encoder: Hub id, folder, or a name of `dual-slm backbones`.")
    audio_model_revision: str | None = option(None, "Commit of the speech encoder on the Hub.")
    audio_model_fingerprint: str | None = option(
        None, "Hash of the encoder's tensors. `from_pretrained` refuses an encoder with another hash."
    )
    text_model_id: str | None = option(None, "LLM: Hub id, folder, or a name of `dual-slm backbones`.")
    text_model_revision: str | None = option(None, "Commit of the LLM on the Hub.")
    text_model_fingerprint: str | None = option(None, "Hash of the LLM's tensors, as for the encoder.")
    paralinguistic_token_id: int | None = option(
        None, "Placeholder of the paralinguistic embeddings. Default: the first id past the vocabulary."
    )
    linguistic_token_id: int | None = option(
        None, "Placeholder of the linguistic embeddings. Default: the second id past the vocabulary."
    )
    encoder_padding: Literal["max_length", "real"] = option(
        "max_length",
        "`max_length` encodes each clip padded to 30 s, as Whisper was trained. `real` encodes its real length with a "
        "mask, which costs a 4 s clip an eighth. Features differ between the two, so this belongs to the checkpoint. "
        "Encoders of waveforms always take the real length.",
    )
    lora_config: dict | None = option(
        None,
        "Fields of peft's `LoraConfig` for the LLM. Its tensors are saved in model.safetensors beside the adapters.",
    )


@dataclass(kw_only=True)
class ParalinguisticAdapterConfig:
    """How it is said (arXiv 2508.08095, eq. 4). The defaults are the paper's adapter."""

    paralinguistic_adapter_type: Literal["pooling", "query"] = option(
        "pooling",
        "`pooling` is the dual-adapter paper's. `query` is EmoSLLM's QPMapper (arXiv 2508.14130): learned queries beside "
        "the frames through transformer layers of width `paralinguistic_hidden_size` (default 768).",
    )
    num_paralinguistic_tokens: int = option(
        16, "Embeddings of one utterance. The public text of the paper lost its value."
    )
    paralinguistic_num_layers: int = option(1, "Transformer layers over the frames; 0 leaves them out.")
    paralinguistic_num_heads: int = option(8, "Attention heads of these layers.")
    paralinguistic_intermediate_size: int | None = option(
        None, "Width of their feed-forward part. Default: 4 times the width."
    )
    paralinguistic_dropout: float = option(0.1, "Dropout of these layers, and of the hidden layer.")
    paralinguistic_pooling: Literal["adaptive", "statistics", "dynamics"] = option(
        "adaptive",
        "`adaptive` averages equal stretches of time (paper). `statistics` gives each token mean and standard deviation "
        "over the utterance. `dynamics` adds the mean absolute step between frames, which tells fast from slow speech.",
    )
    paralinguistic_slot_vectors: bool = option(False, "Add a learned vector to each token.")
    paralinguistic_layer_mix: bool = option(
        False, "Read a learned mixture of all encoder layers, not the last alone; with statistics, one for each token."
    )
    paralinguistic_layer_concat: bool = option(
        False, "With statistics and the layer mix, read the layers side by side in place of a mixture."
    )
    paralinguistic_hidden_size: int | None = option(
        None, "Width of a hidden layer with GELU before the output. Default: none, one linear layer (paper)."
    )
    paralinguistic_soft_vocab_size: int = option(
        0, "If positive, each output is the softmax-weighted mean of this many of the LLM's token embeddings."
    )
    paralinguistic_soft_residual: bool = option(
        False, "Add a free vector to each soft token, from a linear layer that starts at zero."
    )
    caption_origin: dict | None = option(
        None,
        "The LLM that soft tokens learned with, where it is another one than the checkpoint's: its name, fingerprint and "
        "width, and how its tokens spell `caption_template`. `dual-slm port` writes it.",
    )

    @property
    def reads_statistics(self) -> bool:
        """Whether the adapter reads nothing but statistics of an utterance."""
        return self.paralinguistic_pooling != "adaptive" and not self.paralinguistic_num_layers

    def check_paralinguistic(self, encoder_width: int) -> None:
        """Raises `ValueError` where the fields contradict each other."""
        _at_least_one(self, "num_paralinguistic_tokens")
        if self.paralinguistic_soft_residual and not self.paralinguistic_soft_vocab_size:
            raise ValueError(
                "paralinguistic_soft_residual needs soft tokens, but paralinguistic_soft_vocab_size is 0."
            )
        query = self.paralinguistic_adapter_type == "query"
        if self.paralinguistic_layer_concat and (
            query or not (self.reads_statistics and self.paralinguistic_layer_mix)
        ):
            raise ValueError(
                "paralinguistic_layer_concat puts the statistics of all layers side by side: it needs "
                "paralinguistic_adapter_type: pooling, paralinguistic_pooling: statistics (or dynamics), "
                "paralinguistic_num_layers: 0 and paralinguistic_layer_mix: true."
            )
        if query and self.paralinguistic_soft_vocab_size:
            raise ValueError(
                "paralinguistic_adapter_type: query has outputs of its own, no soft tokens: leave out caption_template "
                "and paralinguistic_soft_vocab_size, or take pooling."
            )
        width = (self.paralinguistic_hidden_size or 768) if query else encoder_width
        if self.paralinguistic_num_layers and width % self.paralinguistic_num_heads:
            raise ValueError(
                f"the transformer's width {width} is no multiple of "
                f"paralinguistic_num_heads={self.paralinguistic_num_heads}."
            )


@dataclass(kw_only=True)
class LinguisticAdapterConfig:
    """What is said (arXiv 2508.08095, eq. 5). The defaults are the paper's adapter."""

    linguistic_adapter_type: Literal["concat", "letters", "none"] = option(
        "concat",
        "`concat`: k frames concatenated, two linear layers (paper). `letters`: character CTC, and a beam search over the "
        "lexicon in the checkpoint. `none`: the words come as text.",
    )
    linguistic_downsample_rate: int = option(5, "k encoder frames (50 Hz) are concatenated; 5 gives 10 Hz (paper).")
    linguistic_hidden_size: int = option(2048, "Width of the hidden layer (SLAM-ASR, which the paper follows).")
    linguistic_dropout: float = option(0.0, "Dropout on the hidden layer.")
    linguistic_input_norm: bool = option(False, "LayerNorm on the concatenated frames.")
    linguistic_letters: str = option(ALPHABET, "Characters that `letters` writes in, the space first.")
    linguistic_num_layers: int = option(4, "Convolutions over time of `letters`, each over five outputs.")
    linguistic_lexicon_size: int = option(0, "Rows of the lexicon of `letters`; stage 0 of training fills it.")
    linguistic_lexicon_pairs: int = option(0, "Bigrams of the lexicon.")
    linguistic_beam_width: int = option(32, "Hypotheses that the beam search of `letters` keeps.")

    def check_linguistic(self) -> None:
        """Raises `ValueError` where the fields contradict each other."""
        _at_least_one(self, "linguistic_downsample_rate", "linguistic_hidden_size", "linguistic_beam_width")
        letters = self.linguistic_letters
        once = len(set(letters)) == len(letters) < 255  # the lexicon counts letters in bytes
        if letters[:1] != " " or not once or letters != unicodedata.normalize("NFC", letters.lower()):
            raise ValueError(
                f"linguistic_letters is {letters!r}; it begins with the space and has each lower-case letter once, at "
                "most 254 in all, with composed accents (NFC)."
            )
        if self.linguistic_adapter_type == "letters" and self.linguistic_hidden_size % 8:
            raise ValueError(
                "linguistic_adapter_type: letters needs a linguistic_hidden_size that is a multiple of 8, not "
                f"{self.linguistic_hidden_size}."
            )


@dataclass(kw_only=True)
class PromptConfig:
    """What a checkpoint was taught to say of a voice, and what it is asked."""

    caption_template: str | None = option(
        None, "Sentence that the paralinguistic tokens spell, with `{attribute}` fields, if they were taught to."
    )
    attribute_labels: dict | None = option(None, "Attribute -> its classes, for each field of `caption_template`.")
    attribute_thresholds: dict | None = option(
        None, "Borders of low | normal | high for pitch (Hz) and energy (RMS), and for tempo (seconds a word)."
    )
    attribute_questions: dict | None = option(
        None,
        'Attribute -> `{"instruction", "answer"}`: what the LLM is asked for the probability of each label, where the '
        "adapter spells no captions.",
    )
    prompt_facts: list | None = option(
        None, "Attributes that the prompts of attribute tasks tell in words (EmoSLLM's additional features)."
    )


def _at_least_one(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")


# Fields of version 0.1, and the only value with which a checkpoint of that version can still be read.
_RETIRED = {"linguistic_ctc_vocab_size": 0, "linguistic_soft_residual": False, "lora_only_with_audio": False}


class DualSLMConfig(
    PromptConfig, LinguisticAdapterConfig, ParalinguisticAdapterConfig, BackboneConfig, PreTrainedConfig
):
    r"""
    Configuration of [`DualSLMForConditionalGeneration`]: a frozen speech encoder and a frozen instruct LLM joined by a
    paralinguistic and a linguistic adapter ("Dual Information Speech Language Models for Emotional Conversations",
    arXiv 2508.08095, sections III-A and IV-C). The defaults of the adapter fields are the paper's adapters.

    Args:
        audio_config (`PreTrainedConfig` or `dict`):
            Configuration of the speech encoder: a Whisper, or one that reads waveforms (WavLM, HuBERT, wav2vec 2.0).
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the LLM (any causal LM of transformers).
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the adapters' random initialisation.
    """

    model_type = "dual_slm"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    audio_config: Any = None
    text_config: Any = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name, value in _RETIRED.items():
            if kwargs.pop(name, value) != value:
                raise ValueError(
                    f"{name} is a field of version 0.1 that this version cannot run. Load the checkpoint with "
                    "dual-slm 0.1.0, or train its adapters again."
                )
        self.audio_config = _as_config(self.audio_config, default="whisper")
        self.text_config = _as_config(self.text_config, default="llama")
        vocab_size = self.text_config.vocab_size
        if self.paralinguistic_token_id is None:
            self.paralinguistic_token_id = vocab_size
        if self.linguistic_token_id is None:
            self.linguistic_token_id = vocab_size + 1
        self.prompt_facts = list(self.prompt_facts or [])
        # Generation and the Trainer look for these on the outer config.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        if kwargs["pad_token_id"] is None:
            eos = kwargs["eos_token_id"]
            kwargs["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        # pipeline(model=...) finds its task here; transformers has none of this name.
        pipeline = {"impl": "processing_dual_slm.AudioTextToTextPipeline", "pt": ["AutoModelForMultimodalLM"]}
        kwargs.setdefault("custom_pipelines", {"audio-text-to-text": pipeline | {"tf": [], "type": "multimodal"}})
        super().__post_init__(**kwargs)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        self.check_paralinguistic(self.audio_hidden_size)
        self.check_linguistic()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        for side in ("audio", "text"):  # a backbone from another repository has no commit of the first one
            if f"{side}_model_id" in kwargs:
                kwargs.setdefault(f"{side}_model_revision", None)
        return super().from_dict(config_dict, **kwargs)

    @property
    def audio_hidden_size(self) -> int:
        """Width of the speech encoder."""
        return self.audio_config.hidden_size

    @property
    def audio_num_layers(self) -> int:
        """Transformer layers of the speech encoder."""
        return self.audio_config.num_hidden_layers

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.text_config

    @classmethod
    def slm_qwen(cls, **overrides) -> "DualSLMConfig":
        """SLM-Qwen of the paper (section IV-C): Whisper-large-v3 and Qwen2.5-7B-Instruct, the paper's adapters."""
        # The tokenizer ends before the embedding matrix, so its first free ids are not past the vocabulary.
        placeholders: dict[str, Any] = {"paralinguistic_token_id": 151665, "linguistic_token_id": 151666}
        return cls(**(_WHISPER_LARGE_V3 | _QWEN_7B | placeholders | overrides))

    @classmethod
    def slm_llama(cls, **overrides) -> "DualSLMConfig":
        """SLM-Llama of the paper (section IV-C): Whisper-large-v3 and Llama-3.1-8B-Instruct, the paper's adapters."""
        return cls(**(_WHISPER_LARGE_V3 | _LLAMA_8B | overrides))

    @classmethod
    def slm_smollm2(cls, **overrides) -> "DualSLMConfig":
        """The small one for a CPU: Whisper base and SmolLM2-135M-Instruct, adapters made for the warm start."""
        return cls(**(_WHISPER_BASE | _SMOLLM2_135M | WARM_START_ADAPTERS | overrides))


PARTS = (BackboneConfig, ParalinguisticAdapterConfig, LinguisticAdapterConfig, PromptConfig)
FIELDS = {f.name: f for part in PARTS for f in fields(part)}
CHOICES = {
    name: get_args(hint)
    for part in PARTS
    for name, hint in get_type_hints(part).items()
    if get_origin(hint) is Literal
}


def _describe(name: str) -> str:
    declared = FIELDS[name]
    kind = declared.type if isinstance(declared.type, str) else getattr(declared.type, "__name__", str(declared.type))
    return f"        {name} (`{kind}`, defaults to `{declared.default!r}`):\n            {declared.metadata['help']}\n"


DualSLMConfig.__doc__ = f"{(DualSLMConfig.__doc__ or '').rstrip()}\n{''.join(map(_describe, FIELDS))}    "


# EmoSLLM (arXiv 2508.14130): QPMapper, the transcript as text, LoRA on the LLM.
EMOSLLM_ADAPTERS = {
    "paralinguistic_adapter_type": "query",
    "num_paralinguistic_tokens": 32,
    "paralinguistic_num_layers": 2,
    "paralinguistic_num_heads": 8,
    "paralinguistic_hidden_size": 768,
    "paralinguistic_layer_mix": True,
    "linguistic_adapter_type": "none",
    "lora_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
}

# Adapters that learn without the LLM: captions in its own token embeddings, words by character CTC.
WARM_START_ADAPTERS = {
    "encoder_padding": "real",
    "num_paralinguistic_tokens": 16,
    "paralinguistic_num_layers": 0,
    "paralinguistic_dropout": 0.2,
    "paralinguistic_pooling": "statistics",
    "paralinguistic_slot_vectors": True,
    "paralinguistic_layer_mix": True,
    "paralinguistic_hidden_size": 512,
    "paralinguistic_soft_vocab_size": 23,
    "linguistic_adapter_type": "letters",
    "linguistic_downsample_rate": 2,
    "linguistic_hidden_size": 1024,
    "linguistic_dropout": 0.25,
    "linguistic_input_norm": True,
}


def _whisper(width: int, layers: int, heads: int, vocab_size: int, num_mel_bins: int) -> dict:
    sizes = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width}
    sizes |= {name.replace("encoder", "decoder"): value for name, value in sizes.items()}
    return {"model_type": "whisper", "vocab_size": vocab_size, "d_model": width, "num_mel_bins": num_mel_bins} | sizes


def _llm(
    model_type: str, vocab_size: int, width: int, inner: int, layers: int, heads: tuple[int, int], **more: Any
) -> dict:
    """`heads`: of queries, and of keys and values."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return {"model_type": model_type, "vocab_size": vocab_size, "tie_word_embeddings": False} | sizes | more


_WHISPER_BASE = {"audio_config": _whisper(512, 6, 8, 51865, 80), "audio_model_id": "whisper-base"}
_WHISPER_LARGE_V3 = {"audio_config": _whisper(1280, 32, 20, 51866, 128), "audio_model_id": "openai/whisper-large-v3"}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN_TOKENS = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643, "rms_norm_eps": 1e-6}
_QWEN_7B = {
    "text_model_id": "Qwen/Qwen2.5-7B-Instruct",
    "text_config": _llm("qwen2", 152064, 3584, 18944, 28, (28, 4), max_position_embeddings=32768, **_QWEN_TOKENS)
    | {"rope_parameters": _QWEN_ROPE},
}
_LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA_TOKENS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pad_token_id": 128004}
_LLAMA_8B = {
    "text_model_id": "meta-llama/Llama-3.1-8B-Instruct",
    "text_config": _llm("llama", 128256, 4096, 14336, 32, (32, 8), max_position_embeddings=131072, **_LLAMA_TOKENS)
    | {"rms_norm_eps": 1e-5, "rope_parameters": _LLAMA_ROPE},
}
_SMOLLM2_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
_SMOLLM2_135M = {
    "text_model_id": "smollm2-135m-instruct",
    "text_config": _llm("llama", 49152, 576, 1536, 30, (9, 3), max_position_embeddings=8192, **_SMOLLM2_TOKENS)
    | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
}


def _as_config(config, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default), **config)


DualSLMConfig.register_for_auto_class()

__all__ = ["DualSLMConfig"]
