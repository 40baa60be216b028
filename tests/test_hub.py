"""Push, load, pipelines and refusals through the real Hub client, against a stand-in of the Hub on loopback.

Functions named `_client_*` run in a process of their own (`in_fresh_process`): the client reads its environment at import,
and remote code only proves itself where the package cannot be imported. What they return is checked here.
"""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hub_server import Hub, running_hub

BACKBONES = ("me/whisper-tiny", "me/llama-tiny")
REPOS = {"letters": "me/dual-slm-letters", "paper": "me/dual-slm-paper"}
CARD = "---\npipeline_tag: audio-text-to-text\nlibrary_name: transformers\n---\n# A tiny model\n"
MODULES = [path.name for path in Path(__file__).parent.parent.glob("*_dual_slm.py")]
pytestmark = pytest.mark.slow
OPTIONS = {"max_new_tokens": 8, "do_sample": False}

# `None` in sys.modules makes every import of the package fail, as where it is not installed.
WITHOUT_PACKAGE = """
import sys
sys.modules["dual_slm"] = None
try:
    import dual_slm
except ImportError:
    pass
else:
    raise AssertionError("dual_slm can be imported")
"""
RUN = """
import json, sys, torch, test_hub
name, arguments, result = sys.argv[1:]
torch.save(getattr(test_hub, name)(**json.loads(arguments)), result)
"""


def in_fresh_process(client: Callable, folder: Path, url: str, package: bool = False, **arguments) -> dict:
    """Runs a `_client_*` function with an empty Hub cache; returns what it returns."""
    # No setting of the caller's own may leak in: an offline flag, another cache, a real token, a proxy.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON", "DUAL_"))}
    environment = {
        **{k: v for k, v in inherited.items() if not k.lower().endswith("_proxy")},
        "HF_ENDPOINT": url,
        "HF_HOME": tempfile.mkdtemp(prefix="home-", dir=folder),
        "HF_TOKEN": "hf_standin",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = folder / f"{client.__name__}.pt"
    code = RUN if package else WITHOUT_PACKAGE + RUN
    done = subprocess.run(
        [sys.executable, "-c", code, client.__name__, json.dumps(arguments), str(result)],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,  # a question about remote code would be an error, not a wait
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(result, weights_only=True)


def wav(seconds: float, seed: int) -> bytes:
    from conftest import tone  # not at the top: it imports the package, which clients may not have

    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes((tone(seconds, seed) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def spoken(path: str, text: str | None = None) -> dict:
    content = [{"type": "audio", "path": path}]
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def make_chats(clips: list[str]) -> list[list[dict]]:
    """Of different lengths: one clip, none, two, and one that takes two chunks of 30 s."""
    first, second, third, long = clips
    return [
        [spoken(first, "the quick brown fox")],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello to the lazy dog"}],
        [spoken(second), {"role": "assistant", "content": "a dog"}, spoken(third, "jumps")],
        [spoken(long)],
    ]


def answers(model, processor, clips: list[str]) -> dict:
    """Logits of each chat's prompt, and its reply."""
    torch.set_num_threads(1)  # another number, as conftest sets, rounds otherwise
    logits, replies = [], []
    for chat in make_chats(clips):
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
        with torch.inference_mode():
            logits.append(model(**inputs).logits.clone())
        output = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        replies.append(processor.decode(output, skip_special_tokens=True))
    return {"logits": logits, "replies": replies}


def adapters(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("audio_tower", "language_model"))}


def assert_same_answers(got: dict, expected: dict) -> None:
    assert len(got["logits"]) == len(expected["logits"]) == 4
    for mine, theirs in zip(got["logits"], expected["logits"], strict=True):
        assert torch.equal(mine, theirs)
    assert got["replies"] == expected["replies"]


# ---- clients -----------------------------------------------------------------------------------------------------------


def _client_push(folders: list[str], clips: list[str]) -> dict:
    from huggingface_hub import HfApi

    from conftest import make_model

    api, result = HfApi(), {}
    for repo, folder in zip(BACKBONES, folders, strict=True):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder)
    for kind, repo in REPOS.items():
        model, processor = make_model(BACKBONES, kind=kind)
        result[kind] = {"v1": answers(model, processor, clips), "keys": sorted(adapters(model))}
        model.push_to_hub(repo)
        processor.push_to_hub(repo)
        # Not ModelCard.push_to_hub: huggingface_hub 1.x checks a card at the real Hub, whatever HF_ENDPOINT says.
        api.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id=repo)
        api.create_tag(repo, tag="v1")
        with torch.no_grad():  # main moves on, so that a tag that is ignored shows
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        model.push_to_hub(repo)
        result[kind]["main"] = answers(model, processor, clips)
    result["backbones"] = {repo: api.model_info(repo).sha for repo in BACKBONES}
    result["files"] = api.list_repo_files(REPOS["letters"])
    result["tags"] = [tag.name for tag in api.list_repo_refs(REPOS["letters"]).tags]
    result["commits"] = len(api.list_repo_commits(REPOS["letters"]))
    return result


def _client_load(clips: list[str], again: str) -> dict:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

    result = {}
    for kind, repo in REPOS.items():
        for name, revision in (("main", None), ("v1", "v1")):
            options = {"revision": revision, "trust_remote_code": True}
            config = AutoConfig.from_pretrained(repo, **options)
            processor = AutoProcessor.from_pretrained(repo, **options)
            model, info = AutoModelForMultimodalLM.from_pretrained(repo, output_loading_info=True, **options)
            modules = [type(thing).__module__ for thing in (config, processor, model)]
            problems = {key: sorted(map(str, keys)) for key, keys in info.items() if keys}
            result[f"{kind} {name}"] = answers(model, processor, clips) | {
                "remote": all(module.startswith("transformers_modules.") for module in modules),
                "problems": problems,
                "eval": not model.training,
                "trainable": sorted(k for k, p in model.named_parameters() if p.requires_grad),
            }
    plain = AutoModelForCausalLM.from_pretrained("me/llama-mirror")
    encoder = AutoModel.from_pretrained(BACKBONES[0]).get_encoder()
    for part, mine, other in (("llm", model.language_model, plain), ("encoder", model.audio_tower, encoder)):
        for kind in ("named_parameters", "named_buffers"):
            here, there = dict(getattr(mine, kind)()), dict(getattr(other, kind)())
            unequal = [key for key in there if key not in here or not torch.equal(here[key], there[key])]
            result[f"{part} {kind}"] = {"names": sorted(here), "expected": sorted(there), "unequal": unequal}
    half = AutoModelForMultimodalLM.from_pretrained(REPOS["letters"], trust_remote_code=True, dtype="bfloat16")
    result["dtypes"] = {
        "llm": sorted({str(p.dtype) for p in half.language_model.parameters()}),
        "encoder": sorted({str(p.dtype) for p in half.audio_tower.parameters()}),
        "adapters": sorted({str(t.dtype) for t in adapters(half).values() if t.is_floating_point()}),
    }
    result["bfloat16 replies"] = answers(
        half, AutoProcessor.from_pretrained(REPOS["letters"], trust_remote_code=True), clips
    )
    elsewhere = {"text_model_id": "me/llama-mirror", "audio_model_id": BACKBONES[0]}
    model = AutoModelForMultimodalLM.from_pretrained(REPOS["letters"], trust_remote_code=True, **elsewhere)
    result["mirror"] = answers(model, AutoProcessor.from_pretrained(REPOS["letters"], trust_remote_code=True), clips)
    # A model that came as remote code is saved and pushed like any other.
    model = AutoModelForMultimodalLM.from_pretrained(REPOS["letters"], trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(REPOS["letters"], trust_remote_code=True)
    for thing in (model, processor):
        thing.save_pretrained(again)
        thing.push_to_hub("me/again")
    result["adapters"] = adapters(model)
    return result


def _client_again(clips: list[str], again: str) -> dict:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    result = {}
    for name, place in (("folder", again), ("repo", "me/again")):
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
        model = AutoModelForMultimodalLM.from_pretrained(place, trust_remote_code=True)
        result[name] = answers(model, processor, clips) | {"adapters": adapters(model)}
    return result


def _client_installed(clips: list[str]) -> dict:
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    import dual_slm

    dual_slm.register_auto_classes()
    config = AutoConfig.from_pretrained(REPOS["letters"])
    processor = AutoProcessor.from_pretrained(REPOS["letters"])
    model = AutoModelForMultimodalLM.from_pretrained(REPOS["letters"])
    own = (dual_slm.DualSLMConfig, dual_slm.DualSLMProcessor, dual_slm.DualSLMForConditionalGeneration)
    same = [type(thing) is kind for thing, kind in zip((config, processor, model), own, strict=True)]
    return answers(model, processor, clips) | {"own classes": same}


def _client_push_command(clips: list[str], checkpoint: str) -> dict:
    from huggingface_hub import HfApi, ModelCard
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from dual_slm.training.cli import main

    code = main(["push", checkpoint, "--repo", "me/command", "--tag", "v1"])
    options = {"revision": "v1", "trust_remote_code": True}
    model = AutoModelForMultimodalLM.from_pretrained("me/command", **options)
    result = answers(model, AutoProcessor.from_pretrained("me/command", **options), clips)
    files = HfApi().list_repo_files("me/command")
    return result | {"code": code, "files": files, "card": ModelCard.load("me/command").content}


def _client_pipelines(clips: list[str], clip_url: str) -> dict:
    import soundfile
    from transformers import pipeline

    def reply(pipe, chat, **options) -> str:
        return pipe(chat, return_full_text=False, **(limit | options))[0]["generated_text"]

    def replies(pipe, chats, **options) -> list[str]:
        return [output[0]["generated_text"] for output in pipe(chats, return_full_text=False, **limit, **options)]

    samples, rate = soundfile.read(clips[0], dtype="float32")
    forms = {
        "path": {"path": clips[0]},
        "url": {"url": clip_url},
        "file name": {"audio": clips[0]},
        "array": {"audio": samples, "sampling_rate": rate},
    }
    forms = {
        name: [
            {"role": "user", "content": [{"type": "audio", **form}, {"type": "text", "text": "the quick brown fox"}]}
        ]
        for name, form in forms.items()
    }
    limit = {"max_new_tokens": OPTIONS["max_new_tokens"]}
    result, chats = {}, make_chats(clips)
    for kind, repo in REPOS.items():
        for task in ("any-to-any", None):
            pipe = pipeline(task, model=repo, trust_remote_code=True)
            found = result[f"{kind} {task}"] = {"task": pipe.task, "class": type(pipe).__name__}
            found["single"] = [reply(pipe, chat) for chat in chats]
            found["forms"] = {name: reply(pipe, chat) for name, chat in forms.items()}
            found["list"] = replies(pipe, chats)
            found["full"] = pipe(chats[0], **limit)[0]["generated_text"]
            if task is not None:
                continue
            for size in (2, 3, 4):
                found[f"batch {size}"] = replies(pipe, chats, batch_size=size)
            found["custom_pipelines"] = json.loads(pipe.model.config.to_json_string())["custom_pipelines"]
            # No chat, and options of generation: as generate has it.
            text = "the quick brown fox"
            inputs = pipe.processor(text=text)
            option = {}
            for name in ("greedy", "varied"):
                output = pipe.model.generate(**inputs, **OPTIONS, **option)[0, inputs["input_ids"].shape[1] :]
                found[f"{name} text"] = reply(pipe, text, **option)
                found[f"{name} expected"] = pipe.processor.decode(output, skip_special_tokens=True)
                option = {"suppress_tokens": output.tolist()[:1]}
    return result


def _client_push_lora(clips: list[str]) -> dict:
    from test_emosllm import emosllm

    model, processor = emosllm(BACKBONES)
    for thing in (model, processor):
        thing.push_to_hub("me/emosllm")
    return answers(model, processor, clips)


def _client_load_lora(clips: list[str]) -> dict:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model = AutoModelForMultimodalLM.from_pretrained("me/emosllm", trust_remote_code=True)
    return answers(model, AutoProcessor.from_pretrained("me/emosllm", trust_remote_code=True), clips)


def outcome(load: Callable, *args, **options) -> str:
    try:
        load(*args, **options)
    except Exception as error:
        kind = next(kind.__name__ for kind in (OSError, ValueError, Exception) if isinstance(error, kind))
        return f"{kind}: {error}"
    return "loaded"


def _client_refusals(repos: list[str]) -> dict:
    from transformers import AutoModelForMultimodalLM

    return {repo: outcome(AutoModelForMultimodalLM.from_pretrained, repo, trust_remote_code=True) for repo in repos}


def _client_unreachable(adapters_folder: str) -> dict:
    import time

    from transformers import AutoModelForMultimodalLM

    from dual_slm import DualSLMForConditionalGeneration

    time.sleep = lambda seconds: None  # the client asks six times over 23 s for each file
    return {
        "auto": outcome(AutoModelForMultimodalLM.from_pretrained, REPOS["letters"], trust_remote_code=True),
        "repo": outcome(DualSLMForConditionalGeneration.from_pretrained, REPOS["letters"]),
        "folder": outcome(DualSLMForConditionalGeneration.from_pretrained, adapters_folder),
        "new": outcome(DualSLMForConditionalGeneration.from_backbones, *BACKBONES),
    }


# ---- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def other_llama(hub: Hub) -> dict[str, bytes]:
    """The LLM's files with one tensor changed."""
    files = hub.repos[BACKBONES[1]].files()
    weights = load(files["model.safetensors"])
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    return files | {"model.safetensors": save(weights, {"format": "pt"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def clips(hub, folder) -> list[str]:
    paths = []
    for seed, seconds in enumerate((0.9, 2.1, 0.4, 31.0)):
        paths.append(folder / f"clip{seed}.wav")
        paths[-1].write_bytes(wav(seconds, seed))
    hub.static["clip.wav"] = paths[0].read_bytes()
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def pushed(hub, folder, clips, tiny_backbones) -> dict:
    return in_fresh_process(_client_push, folder, hub.url, package=True, folders=list(tiny_backbones), clips=clips)


@pytest.fixture(scope="module")
def loaded(hub, folder, clips, pushed) -> dict:
    # The same files under another id and commit; and backbones that move on after their adapters were trained.
    llama = hub.repos[BACKBONES[1]]
    hub.create("me/llama-mirror", llama.files())
    llama.commit(other_llama(hub))
    return in_fresh_process(_client_load, folder, hub.url, clips=clips, again=str(folder / "again"))


# ---- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REPOS)
def test_a_pushed_repository_holds_the_adapters_and_names_its_backbones(hub, pushed, kind):
    files = hub.repos[REPOS[kind]].files()
    assert sorted(load(files["model.safetensors"])) == pushed[kind]["keys"]
    assert len(pushed[kind]["keys"]) >= 8
    assert all(key.startswith(("paralinguistic_adapter.", "linguistic_adapter.")) for key in pushed[kind]["keys"])
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dual_slm.DualSLMConfig",
        "AutoModelForMultimodalLM": "modeling_dual_slm.DualSLMForConditionalGeneration",
    }
    for side, backbone in zip(("audio", "text"), BACKBONES, strict=True):
        assert config[f"{side}_model_id"] == backbone
        assert config[f"{side}_model_revision"] == pushed["backbones"][backbone]
        assert len(config[f"{side}_model_fingerprint"]) == 64
    assert config["audio_model_fingerprint"] != config["text_model_fingerprint"]
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert json.loads(files[name])["auto_map"] == {"AutoProcessor": "processing_dual_slm.DualSLMProcessor"}
    root = Path(__file__).parent.parent
    for module in MODULES:
        assert files[module] == (root / module).read_bytes()
    assert files["README.md"].decode() == CARD
    # Folders of the machine that pushed have no place in a repository.
    for name, content in files.items():
        if name.endswith(".json"):
            assert b"/tmp" not in content, name


def test_the_client_lists_what_was_pushed(hub, pushed):
    repo = hub.repos[REPOS["letters"]]
    assert sorted(pushed["files"]) == sorted(repo.files())
    assert pushed["tags"] == ["v1"]
    assert pushed["commits"] == len(repo.commits) >= 5
    assert repo.files("v1")["model.safetensors"] != repo.files("main")["model.safetensors"]


@pytest.mark.parametrize("revision", ["main", "v1"])
@pytest.mark.parametrize("kind", REPOS)
def test_remote_code_loads_the_very_model_by_id_and_by_tag(pushed, loaded, kind, revision):
    got = loaded[f"{kind} {revision}"]
    assert_same_answers(got, pushed[kind][revision])
    assert not torch.equal(pushed[kind]["main"]["logits"][0], pushed[kind]["v1"]["logits"][0])
    assert len(set(got["replies"])) == 4  # the tiny model does answer, and each chat differently
    assert got["remote"] and got["eval"] and got["problems"] == {}
    assert got["trainable"] and all("adapter" in name for name in got["trainable"])


@pytest.mark.parametrize("tensors", ["named_parameters", "named_buffers"])
@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_frozen_tensors_equal_those_of_a_plain_load(loaded, part, tensors):
    got = loaded[f"{part} {tensors}"]
    assert got["names"] == got["expected"]
    assert got["unequal"] == []
    assert got["names"] or (part, tensors) == ("encoder", "named_buffers")  # the LLM's rotary buffers must be there


def test_backbones_may_come_from_elsewhere(pushed, loaded):
    assert_same_answers(loaded["mirror"], pushed["letters"]["main"])


def test_dtype_reaches_the_backbones_and_leaves_the_adapters(loaded):
    assert loaded["dtypes"] == {
        "llm": ["torch.bfloat16"],
        "encoder": ["torch.bfloat16"],
        "adapters": ["torch.float32"],
    }
    half = loaded["bfloat16 replies"]["logits"]
    assert all(logits.dtype == torch.bfloat16 and logits.isfinite().all() for logits in half)


def test_saved_and_pushed_again_it_is_the_same_model(hub, folder, clips, pushed, loaded):
    got = in_fresh_process(_client_again, folder, hub.url, clips=clips, again=str(folder / "again"))
    for place in ("folder", "repo"):
        assert_same_answers(got[place], pushed["letters"]["main"])
        assert got[place]["adapters"].keys() == loaded["adapters"].keys()
        for name, tensor in loaded["adapters"].items():
            assert torch.equal(got[place]["adapters"][name], tensor), name
    old, new = (json.loads(hub.repos[repo].files()["config.json"]) for repo in (REPOS["letters"], "me/again"))
    assert new == old


def test_the_installed_package_needs_no_remote_code(hub, folder, clips, pushed):
    got = in_fresh_process(_client_installed, folder, hub.url, package=True, clips=clips)
    assert got["own classes"] == [True, True, True]
    assert_same_answers(got, pushed["letters"]["main"])


def test_the_push_command_uploads_model_processor_and_card(hub, folder, clips, pushed, loaded):
    (folder / "again" / "README.md").write_text(CARD)
    (folder / "again" / "examples").mkdir()
    (folder / "again" / "examples" / "a.ogg").write_bytes(b"a clip")
    (folder / "again" / "notes.txt").write_text("not for the Hub")
    result = in_fresh_process(
        _client_push_command, folder, hub.url, True, clips=clips, checkpoint=str(folder / "again")
    )
    assert result["code"] == 0
    files = {"config.json", "model.safetensors", "processor_config.json", "README.md", "examples/a.ogg", *MODULES}
    assert files <= set(result["files"])
    assert "notes.txt" not in result["files"]
    assert result["card"].strip() == CARD.strip()
    assert_same_answers(result, pushed["letters"]["main"])


def test_lora_goes_to_the_hub_and_back_with_the_adapters(hub, folder, clips, pushed):
    sent = in_fresh_process(_client_push_lora, folder, hub.url, package=True, clips=clips)
    files = hub.repos["me/emosllm"].files()
    assert any(".lora_B." in name for name in load(files["model.safetensors"]))
    assert not [
        name for name in files if name.startswith("adapter_")
    ]  # else it would be taken for a repository of peft's
    assert_same_answers(in_fresh_process(_client_load_lora, folder, hub.url, clips=clips), sent)


def test_pipelines(hub, folder, clips, pushed):
    got = in_fresh_process(_client_pipelines, folder, hub.url, clips=clips, clip_url=f"{hub.url}/static/clip.wav")
    for kind in REPOS:
        expected = pushed[kind]["main"]["replies"]
        for task in ("any-to-any", None):
            found = got[f"{kind} {task}"]
            assert [reply.strip() for reply in found["single"]] == [reply.strip() for reply in expected]
            assert found["list"] == found["single"]
            assert found["forms"] == dict.fromkeys(("path", "url", "file name", "array"), found["single"][0])
            assert found["full"][:-1] == make_chats(clips)[0]
            assert found["full"][-1] == {"role": "assistant", "content": found["single"][0]}
        assert got[f"{kind} any-to-any"]["task"] == "any-to-any"
        found = got[f"{kind} None"]
        assert (found["task"], found["class"]) == ("audio-text-to-text", "AudioTextToTextPipeline")
        for size in (2, 3, 4):
            assert found[f"batch {size}"] == found["single"]
        assert found["greedy text"] == found["greedy expected"] != ""
        assert found["varied text"] == found["varied expected"] != found["greedy expected"]
        # pipeline() replaces names by classes in the config; it must still be savable.
        config = json.loads(hub.repos[REPOS[kind]].files()["config.json"])
        assert found["custom_pipelines"] == config["custom_pipelines"]
        assert set(config["custom_pipelines"]) == {"audio-text-to-text"}


class _Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_damaged_checkpoints_are_refused_by_name(hub, folder, pushed):
    sound = hub.repos[REPOS["letters"]].files()
    weights, config = load(sound["model.safetensors"]), json.loads(sound["config.json"])
    key = "linguistic_adapter.linear_1.weight"
    marker = folder / "unpickled"
    hub.create("me/other-llama", other_llama(hub))
    other = {"text_model_id": "me/other-llama", "text_model_revision": None}

    def weights_file(tensors: dict[str, torch.Tensor]) -> bytes:
        return save(tensors, {"format": "pt"})

    changes = {
        "missing": {"model.safetensors": weights_file({k: v for k, v in weights.items() if k != key})},
        "extra": {"model.safetensors": weights_file(weights | {"linguistic_adapter.third": torch.ones(2)})},
        "shape": {"model.safetensors": weights_file(weights | {key: weights[key][:-1].clone()})},
        "other": {"config.json": json.dumps(config | other).encode()},
        "gone": {"config.json": json.dumps(config | {"text_model_id": "me/nowhere"}).encode()},
        "truncated": {"model.safetensors": sound["model.safetensors"][:-100]},
        "header": {"model.safetensors": sound["model.safetensors"][:40]},
        "pickle": {"model.safetensors": None, "pytorch_model.bin": pickle.dumps(_Intruder(str(marker)))},
    }
    for name, change in changes.items():
        hub.create(f"me/{name}", sound).commit(change)
    got = in_fresh_process(_client_refusals, folder, hub.url, repos=[f"me/{name}" for name in changes])
    messages = {
        "missing": ("ValueError", "me/missing", f"missing keys: {key}"),
        "extra": ("ValueError", "me/extra", "unexpected keys: linguistic_adapter.third"),
        "shape": ("ValueError", "me/shape", "mismatched keys", key),
        "other": ("ValueError", "me/other-llama is not the text backbone", config["text_model_fingerprint"][:16]),
        "gone": ("OSError", "me/nowhere"),
        "truncated": ("OSError", "me/truncated", "damaged or cut short"),
        "header": ("OSError", "me/header", "damaged or cut short"),
        "pickle": ("OSError", "me/pickle", "model.safetensors"),
    }
    for name, parts in messages.items():
        for part in parts:
            assert part in got[f"me/{name}"], (name, got[f"me/{name}"])
    assert not marker.exists()
    fetched = [path for method, path in hub.requests if method == "GET" and path.startswith("me/pickle/resolve/")]
    assert any(path.endswith("/config.json") for path in fetched)
    assert not any(path.endswith(".bin") for path in fetched)


def test_an_unreachable_hub_is_named_with_what_it_should_have_given(folder, pushed, loaded):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"  # bound, never listening: connections are refused
        got = in_fresh_process(_client_unreachable, folder, url, package=True, adapters_folder=str(folder / "again"))
    # Through the Auto class transformers itself gives up, at the config, and names the Hub alone.
    for name, part in (("auto", url), ("repo", REPOS["letters"]), ("folder", BACKBONES[1]), ("new", BACKBONES[0])):
        assert got[name].startswith("OSError") and part in got[name], (name, got[name])
