"""The same promises on a GPU: what is heard, said and learnt there is what a CPU hears, says and learns."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from world import world

from conftest import CONVERSATIONS, make_model, prepare, spoken, typed
from dual_slm.training.cli import main
from dual_slm.training.corpora.table import read_table
from dual_slm.training.features import FeatureStore
from dual_slm.training.recipe import load_recipe
from dual_slm.training.run import run
from dual_slm.training.trainer import last_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def pair(tiny):
    """(model on the CPU, the same on the GPU, processor), with convolutions in float32 there, too."""
    model, processor = tiny
    torch.backends.cudnn.allow_tf32 = False
    yield model, copy.deepcopy(model).cuda(), processor
    torch.backends.cudnn.allow_tf32 = True


def test_logits_and_replies_are_those_of_the_cpu(pair):
    cpu, gpu, processor = pair
    batch = prepare(processor, CONVERSATIONS)
    real = batch["attention_mask"].bool()
    for row, conversation in enumerate(CONVERSATIONS):  # logits where CTC left a placeholder empty mean nothing
        single = prepare(processor, conversation)
        surplus = single["input_ids"][0] == processor.linguistic_token_id
        real[row, real[row].nonzero()[:, 0][surplus]] = False
    with torch.inference_mode():
        expected, found = cpu(**batch).logits, gpu(**batch.to("cuda")).logits
    torch.testing.assert_close(found.cpu()[real], expected[real], atol=1e-3, rtol=1e-3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = prepare(processor, CONVERSATIONS[:5])
    assert torch.equal(gpu.generate(**batch.to("cuda"), **options).cpu(), cpu.generate(**batch.to("cpu"), **options))


def test_what_is_heard_is_what_the_cpu_hears(pair):
    cpu, gpu, processor = pair
    batch = prepare(processor, [CONVERSATIONS[0], CONVERSATIONS[3]])
    audio = {name: batch[name] for name in ("input_features", "input_features_mask", "audio_num_chunks")}
    expected, found = cpu.get_audio_features(**audio), gpu.get_audio_features(**audio)
    torch.testing.assert_close(found.paralinguistic_embeds.cpu(), expected.paralinguistic_embeds, atol=1e-3, rtol=1e-3)
    for one, other in zip(processor.decode_audio(found), processor.decode_audio(expected), strict=True):
        assert one["heard"] == other["heard"]
        for name, shares in (other["attributes"] or {}).items():
            assert one["attributes"][name] == pytest.approx(shares, abs=1e-3)


def test_a_conversation_goes_on_there(pair):
    cpu, gpu, processor = pair
    talks = [processor.conversation(model, max_new_tokens=5) for model in (cpu, gpu)]
    for turn in ({"audio": spoken(0.9, 3)["content"][0]["audio"]}, {"text": "the lazy dog"}):
        expected, found = (talk.say(**turn) for talk in talks)
        assert found["reply"] == expected["reply"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_onto_the_device_and_its_text_is_the_bare_llms(pair, tiny_backbones, tmp_path, dtype):
    cpu, _, processor = pair
    cpu.save_pretrained(tmp_path)
    options = {"dtype": dtype, "device_map": "cuda"}
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path, **options)
    assert {p.device.type for p in model.parameters()} | {b.device.type for b in model.buffers()} == {"cuda"}
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1], **options)
    inputs = prepare(processor, [[typed("hello to the dog")], [typed("the quick brown fox jumps")]]).to("cuda")
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
    prompt = prepare(processor, CONVERSATIONS[3]).to("cuda")
    reply = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert reply.device.type == "cuda"


@pytest.mark.parametrize("kind", ["paper", "letters"])
def test_features_are_those_of_the_cpu(tiny_backbones, tmp_path, kind):
    world(tmp_path, tiny_backbones, clips=6)
    rows = list(read_table(tmp_path / "t.parquet"))
    model, processor = make_model(tiny_backbones, kind=kind)
    states = []
    for name, device in (("cpu", None), ("gpu", "cuda")):
        store = FeatureStore(tmp_path / name, model.config)
        store.build(rows, model, processor, workers=0, device=device)
        states.append([store.get(row) for row in rows])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, atol=0.05 * a.abs().max().item(), rtol=0.05)  # in bfloat16


def test_a_run_with_all_stages_and_its_evaluation(tiny_backbones, tmp_path, capsys):
    final = run(load_recipe(str(world(tmp_path, tiny_backbones))), tmp_path / "out")
    state = load_file(final / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    assert json.loads((tmp_path / "out/environment.json").read_text())["gpu"]
    logged = json.loads((final / "training_log.json").read_text())
    assert {entry["stage"] for entry in logged} > {"linguistic", "paralinguistic"}
    table, report = str(tmp_path / "t.parquet"), str(tmp_path / "report")
    command = ["evaluate", str(final), "--data", table, "--split", "validation", "--out", report, "--device", "cuda"]
    assert main([*command, "--suite", "attributes"]) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "report/report.json").read_text())
    assert figures


def test_a_run_goes_on_after_a_kill(tiny_backbones, tmp_path):
    """The ends of its last two stages are made again: the same weights, as near as sums in another order allow."""
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    final = run(recipe, tmp_path / "out")
    whole = load_file(final / "model.safetensors")
    stages = sorted((tmp_path / "out").glob("stage-*"))
    for stage in stages[2:]:
        shutil.rmtree(last_checkpoint(stage))
        shutil.rmtree(stage / "final")
    shutil.rmtree(final)
    again = load_file(run(recipe, tmp_path / "out", resume=True) / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-3, rtol=1e-2)
