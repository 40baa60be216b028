"""Configuration of a dual-adapter speech language model."""

import unicodedata

from transformers import AutoConfig, PreTrainedConfig

ALPHABET = " abcdefghijklmnopqrstuvwxyz'"


class DualSLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`DualSLMForConditionalGeneration`]: a frozen speech encoder and a frozen instruct LLM joined by a
    paralinguistic and a linguistic adapter ("Dual Information Speech Language Models for Emotional Conversations",
    arXiv 2508.08095, sections III-A and IV-C). The defaults of the adapter fields are the paper's adapters.

    Args:
        audio_config (`PreTrainedConfig` or `dict`):
            Configuration of the speech encoder: a Whisper, or one that reads waveforms (WavLM, HuBERT, wav2vec 2.0).
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the LLM (any causal LM of transformers).
        audio_model_id, text_model_id (`str`, *optional*):
            Where the backbones are: a Hub id, a local folder, or a name that `dual-slm backbones` lists.
        audio_model_revision, text_model_revision (`str`, *optional*):
            Commit of a backbone on the Hub.
        audio_model_fingerprint, text_model_fingerprint (`str`, *optional*):
            Hash over names, shapes and sampled values of a backbone's tensors. `from_pretrained` refuses any other
            backbone: adapters are meaningless without the very weights they were trained on.
        paralinguistic_token_id, linguistic_token_id (`int`, *optional*):
            Placeholders that the embeddings of the adapters replace. They lie past the tokenizer's last token; the LLM's
            embedding matrix is never resized. Default: the first two ids past the vocabulary.
        encoder_padding (`str`, defaults to `"max_length"`):
            `"max_length"` encodes every clip padded to 30 s, as Whisper was trained; `"real"` encodes its real length
            with a mask, which costs a 4 s clip an eighth. Either way only real frames reach the adapters. Features
            differ a little between the two, so this is a property of the checkpoint, not a switch at run time. Encoders
            of waveforms always take the real length.
        paralinguistic_adapter_type (`str`, defaults to `"pooling"`):
            `"pooling"` is the dual-adapter paper's. `"query"` is EmoSLLM's QPMapper (arXiv 2508.14130): learned queries
            beside the frames through transformer layers of width `paralinguistic_hidden_size` (768 there, 2 layers, 8
            heads, 32 queries), then a linear layer; of the other fields it uses the layer mix and the dropout.
        num_paralinguistic_tokens (`int`, defaults to 16):
            Embeddings of one utterance from the paralinguistic adapter. (The public text of the paper lost its value.)
        paralinguistic_num_layers (`int`, defaults to 1):
            Transformer layers over the frames. 0 leaves them out.
        paralinguistic_num_heads (`int`, defaults to 8):
            Attention heads of these layers.
        paralinguistic_intermediate_size (`int`, *optional*):
            Width of their feed-forward part. Default: 4 times the encoder's width.
        paralinguistic_dropout (`float`, defaults to 0.1):
            Dropout of these layers, and of the hidden layer where there is one.
        paralinguistic_pooling (`str`, defaults to `"adaptive"`):
            `"adaptive"` averages `num_paralinguistic_tokens` equal stretches of time (paper). `"statistics"` gives every
            token the mean and standard deviation over the whole utterance; slot vectors then tell the tokens apart.
            `"dynamics"` adds the mean absolute step from frame to frame, which tells fast speech from slow.
        paralinguistic_slot_vectors (`bool`, defaults to `False`):
            Add a learned vector to each of the tokens.
        paralinguistic_layer_mix (`bool`, defaults to `False`):
            Read a learned mixture of all encoder layers, not the last alone; with statistics, one for each token.
        paralinguistic_layer_concat (`bool`, defaults to `False`):
            With statistics and the layer mix, read the layers side by side in place of a mixture: L times the inputs of the
            hidden layer.
        paralinguistic_hidden_size (`int`, *optional*):
            Width of a hidden layer with GELU before the output. Default: none, one linear layer (paper).
        paralinguistic_soft_vocab_size (`int`, defaults to 0):
            If positive, each output is the softmax-weighted mean of that many of the LLM's own token embeddings (the
            pieces that captions are spelled with) in place of the free vector.
        paralinguistic_soft_residual (`bool`, defaults to `False`):
            Add a free vector to each soft token, from a linear layer that starts at zero: nothing is lost of what the
            warm start taught, and training through the LLM can say what no mixture of caption pieces says.
        linguistic_adapter_type (`str`, defaults to `"concat"`):
            `"concat"`: k frames concatenated, two linear layers (paper). `"letters"`: CTC over letters, spelled into the
            LLM's own tokens by a beam search over a lexicon of words and pairs of words that lies in the checkpoint.
            `"none"`: the words come as text, `linguistic: transcript`, or nothing.
        linguistic_downsample_rate (`int`, defaults to 5):
            Encoder frames (50 Hz) concatenated into one embedding: 5 gives 10 Hz (paper).
        linguistic_hidden_size (`int`, defaults to 2048):
            Width of the hidden layer (SLAM-ASR, which the paper follows).
        linguistic_dropout (`float`, defaults to 0.0):
            Dropout on the hidden layer.
        linguistic_input_norm (`bool`, defaults to `False`):
            LayerNorm on the concatenated frames.
        linguistic_ctc_vocab_size (`int`, defaults to 0):
            If positive, the outputs are read as CTC over that many of the LLM's own tokens: blanks are dropped, repeats
            merged, and each remaining segment becomes the softmax-weighted mean of the LLM's token embeddings. The
            sequence shrinks to about the length of the text. 0 feeds the outputs as they are (paper).
        linguistic_letters (`str`, defaults to the space, a to z and the apostrophe):
            What `"letters"` writes in, one character each, the space first.
        linguistic_num_layers (`int`, defaults to 4):
            Convolutions over time of `"letters"`, each over five outputs.
        linguistic_lexicon_size (`int`, defaults to 0):
            Rows of the lexicon of `"letters"`; stage 0 of training fills it.
        linguistic_lexicon_pairs (`int`, defaults to 0):
            Pairs of words that the lexicon knows to follow each other.
        linguistic_beam_width (`int`, defaults to 32):
            Texts that the search of `"letters"` keeps.
        linguistic_soft_residual (`bool`, defaults to `False`):
            As `paralinguistic_soft_residual`, from the mean output of each segment.
        caption_template (`str`, *optional*):
            The sentence that the paralinguistic tokens spell, with `{attribute}` fields, where the adapter was taught to.
        attribute_labels (`dict[str, list[str]]`, *optional*):
            The classes of each attribute in `caption_template`.
        attribute_thresholds (`dict[str, tuple[float, float]]`, *optional*):
            Borders of low | normal | high that pitch (Hz), energy (RMS) and tempo (s a word) were labelled by.
        attribute_questions (`dict[str, dict[str, str]]`, *optional*):
            For an adapter that spells no captions: `{attribute: {"instruction": ..., "answer": "... {label} ..."}}`, what the
            LLM is asked to get the probability of each of `attribute_labels`.
        prompt_facts (`list[str]`, defaults to none):
            Attributes that the prompts of attribute tasks tell in words, as in training (EmoSLLM's additional features).
        lora_config (`dict`, *optional*):
            Fields of peft's `LoraConfig` for the LLM. Its tensors lie in model.safetensors beside the adapters; the LLM's own
            weights stay frozen.
        lora_only_with_audio (`bool`, defaults to `False`):
            Switch LoRA off for inputs without audio: they get the bare LLM.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the adapters' random initialisation.
    """

    model_type = "dual_slm"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        audio_config=None,
        text_config=None,
        audio_model_id: str | None = None,
        audio_model_revision: str | None = None,
        audio_model_fingerprint: str | None = None,
        text_model_id: str | None = None,
        text_model_revision: str | None = None,
        text_model_fingerprint: str | None = None,
        paralinguistic_token_id: int | None = None,
        linguistic_token_id: int | None = None,
        encoder_padding: str = "max_length",
        paralinguistic_adapter_type: str = "pooling",
        num_paralinguistic_tokens: int = 16,
        paralinguistic_num_layers: int = 1,
        paralinguistic_num_heads: int = 8,
        paralinguistic_intermediate_size: int | None = None,
        paralinguistic_dropout: float = 0.1,
        paralinguistic_pooling: str = "adaptive",
        paralinguistic_slot_vectors: bool = False,
        paralinguistic_layer_mix: bool = False,
        paralinguistic_layer_concat: bool = False,
        paralinguistic_hidden_size: int | None = None,
        paralinguistic_soft_vocab_size: int = 0,
        paralinguistic_soft_residual: bool = False,
        linguistic_adapter_type: str = "concat",
        linguistic_downsample_rate: int = 5,
        linguistic_hidden_size: int = 2048,
        linguistic_dropout: float = 0.0,
        linguistic_input_norm: bool = False,
        linguistic_ctc_vocab_size: int = 0,
        linguistic_letters: str = ALPHABET,
        linguistic_num_layers: int = 4,
        linguistic_lexicon_size: int = 0,
        linguistic_lexicon_pairs: int = 0,
        linguistic_beam_width: int = 32,
        linguistic_soft_residual: bool = False,
        caption_template: str | None = None,
        attribute_labels: dict[str, list[str]] | None = None,
        attribute_thresholds: dict[str, list[float]] | None = None,
        attribute_questions: dict[str, dict[str, str]] | None = None,
        prompt_facts: list[str] | None = None,
        lora_config: dict | None = None,
        lora_only_with_audio: bool = False,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.audio_config = _as_config(audio_config, default="whisper")
        self.text_config = _as_config(text_config, default="llama")
        self.audio_model_id = audio_model_id
        self.audio_model_revision = audio_model_revision
        self.audio_model_fingerprint = audio_model_fingerprint
        self.text_model_id = text_model_id
        self.text_model_revision = text_model_revision
        self.text_model_fingerprint = text_model_fingerprint
        vocab_size = self.text_config.vocab_size
        self.paralinguistic_token_id = vocab_size if paralinguistic_token_id is None else paralinguistic_token_id
        self.linguistic_token_id = vocab_size + 1 if linguistic_token_id is None else linguistic_token_id
        self.encoder_padding = encoder_padding
        self.paralinguistic_adapter_type = paralinguistic_adapter_type
        self.num_paralinguistic_tokens = num_paralinguistic_tokens
        self.paralinguistic_num_layers = paralinguistic_num_layers
        self.paralinguistic_num_heads = paralinguistic_num_heads
        self.paralinguistic_intermediate_size = paralinguistic_intermediate_size
        self.paralinguistic_dropout = paralinguistic_dropout
        self.paralinguistic_pooling = paralinguistic_pooling
        self.paralinguistic_slot_vectors = paralinguistic_slot_vectors
        self.paralinguistic_layer_mix = paralinguistic_layer_mix
        self.paralinguistic_layer_concat = paralinguistic_layer_concat
        self.paralinguistic_hidden_size = paralinguistic_hidden_size
        self.paralinguistic_soft_vocab_size = paralinguistic_soft_vocab_size
        self.paralinguistic_soft_residual = paralinguistic_soft_residual
        self.linguistic_adapter_type = linguistic_adapter_type
        self.linguistic_downsample_rate = linguistic_downsample_rate
        self.linguistic_hidden_size = linguistic_hidden_size
        self.linguistic_dropout = linguistic_dropout
        self.linguistic_input_norm = linguistic_input_norm
        self.linguistic_ctc_vocab_size = linguistic_ctc_vocab_size
        self.linguistic_letters = linguistic_letters
        self.linguistic_num_layers = linguistic_num_layers
        self.linguistic_lexicon_size = linguistic_lexicon_size
        self.linguistic_lexicon_pairs = linguistic_lexicon_pairs
        self.linguistic_beam_width = linguistic_beam_width
        self.linguistic_soft_residual = linguistic_soft_residual
        self.caption_template = caption_template
        self.attribute_labels = attribute_labels
        self.attribute_thresholds = attribute_thresholds
        self.attribute_questions = attribute_questions
        self.prompt_facts = list(prompt_facts or [])
        self.lora_config = lora_config
        self.lora_only_with_audio = lora_only_with_audio
        self.initializer_range = initializer_range
        # Generation and the Trainer look for these on the outer config.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        if kwargs["pad_token_id"] is None:
            eos = kwargs["eos_token_id"]
            kwargs["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        # pipeline(model=...) finds its task here; transformers has none of this name.
        pipeline = {"impl": "processing_dual_slm.AudioTextToTextPipeline", "pt": ["AutoModelForMultimodalLM"]}
        kwargs.setdefault("custom_pipelines", {"audio-text-to-text": pipeline | {"tf": [], "type": "multimodal"}})
        super().__init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        for name, choices in {
            "encoder_padding": ("max_length", "real"),
            "paralinguistic_adapter_type": ("pooling", "query"),
            "linguistic_adapter_type": ("concat", "letters", "none"),
            "paralinguistic_pooling": ("adaptive", "statistics", "dynamics"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        positive = ("num_paralinguistic_tokens", "linguistic_downsample_rate", "linguistic_hidden_size")
        for name in (*positive, "linguistic_beam_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, vocabulary in (("paralinguistic", "soft"), ("linguistic", "ctc")):
            if getattr(self, f"{name}_soft_residual") and not getattr(self, f"{name}_{vocabulary}_vocab_size"):
                raise ValueError(
                    f"{name}_soft_residual stands beside soft tokens, and {name}_{vocabulary}_vocab_size is 0."
                )
        letters = self.linguistic_letters
        once = len(set(letters)) == len(letters) < 255  # counted in bytes
        if letters[:1] != " " or not once or letters != unicodedata.normalize("NFC", letters.lower()):
            raise ValueError(
                f"linguistic_letters is {letters!r}; it begins with the space, and has each lower-case letter once, at most "
                "254 in all, accents in one piece with their letters (NFC)."
            )
        if self.linguistic_adapter_type == "letters" and (
            self.linguistic_ctc_vocab_size or self.linguistic_soft_residual or self.linguistic_hidden_size % 8
        ):
            raise ValueError(
                "linguistic_adapter_type: letters has no linguistic_ctc_vocab_size and no linguistic_soft_residual, and a "
                f"linguistic_hidden_size that is a multiple of 8, not {self.linguistic_hidden_size}."
            )
        if self.paralinguistic_layer_concat and not (
            self.reads_statistics and self.paralinguistic_layer_mix and self.paralinguistic_adapter_type == "pooling"
        ):
            raise ValueError(
                "paralinguistic_layer_concat puts the statistics of all layers side by side: it needs "
                "paralinguistic_adapter_type: pooling, paralinguistic_pooling: statistics (or dynamics), "
                "paralinguistic_num_layers: 0 and paralinguistic_layer_mix: true."
            )
        if self.paralinguistic_adapter_type == "query" and self.paralinguistic_soft_vocab_size:
            raise ValueError(
                "paralinguistic_adapter_type: query has outputs of its own, no soft tokens: leave out caption_template and "
                "paralinguistic_soft_vocab_size, or take pooling."
            )
        width = self.audio_hidden_size
        if self.paralinguistic_adapter_type == "query":
            width = self.paralinguistic_hidden_size or 768
        if self.paralinguistic_num_layers and width % self.paralinguistic_num_heads:
            raise ValueError(
                f"the transformer's width {width} is no multiple of paralinguistic_num_heads="
                f"{self.paralinguistic_num_heads}."
            )

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

    @property
    def reads_statistics(self) -> bool:
        """Whether the paralinguistic adapter reads nothing but statistics of an utterance."""
        return self.paralinguistic_pooling != "adaptive" and not self.paralinguistic_num_layers

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.text_config

    @classmethod
    def slm_qwen(cls, **overrides) -> "DualSLMConfig":
        """SLM-Qwen of the paper (section IV-C): Whisper-large-v3 and Qwen2.5-7B-Instruct, the paper's adapters."""
        text = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
        text |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        text |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        text |= {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
        values = {"text_config": text, "text_model_id": "Qwen/Qwen2.5-7B-Instruct"}
        values |= {
            "paralinguistic_token_id": 151665,
            "linguistic_token_id": 151666,
        }  # its tokenizer ends before its matrix
        return cls(**(_WHISPER_LARGE_V3 | values | overrides))

    @classmethod
    def slm_llama(cls, **overrides) -> "DualSLMConfig":
        """SLM-Llama of the paper (section IV-C): Whisper-large-v3 and Llama-3.1-8B-Instruct, the paper's adapters."""
        text = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
        text |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        text |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        text |= {"rope_parameters": rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
        text |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pad_token_id": 128004}
        values = {"text_config": text, "text_model_id": "meta-llama/Llama-3.1-8B-Instruct"}
        return cls(**(_WHISPER_LARGE_V3 | values | overrides))

    @classmethod
    def slm_smollm2(cls, **overrides) -> "DualSLMConfig":
        """The small one for a CPU: Whisper base and SmolLM2-135M-Instruct, adapters made for the warm start."""
        audio = {"model_type": "whisper", "vocab_size": 51865, "d_model": 512, "num_mel_bins": 80}
        audio |= {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
        audio |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
        text = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
        text |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        text |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        values = {"audio_config": audio, "audio_model_id": "whisper-base"}
        values |= {"text_config": text, "text_model_id": "smollm2-135m-instruct"}
        return cls(**(values | WARM_START_ADAPTERS | LETTER_ADAPTER | overrides))


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

# The adapters that learn without the LLM (DESIGN, Embedding-space warm start): outputs in the LLM's own token embeddings.
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
    "linguistic_downsample_rate": 2,
    "linguistic_hidden_size": 2048,
    "linguistic_dropout": 0.25,
    "linguistic_input_norm": True,
    "linguistic_ctc_vocab_size": 9085,
}

# In the place of their linguistic part: letters in place of the LLM's tokens, which few hours of speech say all of.
LETTER_ADAPTER = {
    "linguistic_adapter_type": "letters",
    "linguistic_hidden_size": 1024,
    "linguistic_ctc_vocab_size": 0,
}

_WHISPER_LARGE_V3 = {
    "audio_config": {
        "model_type": "whisper",
        "vocab_size": 51866,
        "d_model": 1280,
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "decoder_layers": 32,
        "encoder_attention_heads": 20,
        "decoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "decoder_ffn_dim": 5120,
    },
    "audio_model_id": "openai/whisper-large-v3",
}


def _as_config(config, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", default)
    return AutoConfig.for_model(model_type, **config)


DualSLMConfig.register_for_auto_class()

__all__ = ["DualSLMConfig"]
