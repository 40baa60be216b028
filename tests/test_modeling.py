"""The promises of the model: batches equal single runs, the LLM stays itself, the backbones stay frozen."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from conftest import CONVERSATIONS, make_model, prepare, spoken, tone, typed
from dual_slm import DualSLMForConditionalGeneration, encoder_dual_slm


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_gives_what_single_runs_give(tiny, padding_side, seed):
    model, processor = tiny
    rng = np.random.default_rng(seed)
    chosen = [CONVERSATIONS[i] for i in rng.permutation(len(CONVERSATIONS))[: rng.integers(2, 7)]]
    batch = prepare(processor, chosen, padding_side=padding_side)
    with torch.inference_mode():
        together = model(**batch).logits
    for row, conversation in enumerate(chosen):
        single = prepare(processor, conversation)
        with torch.inference_mode():
            alone = model(**single).logits[0]
        real = batch["attention_mask"][row].bool()
        # Logits at placeholders that CTC left empty mean nothing; everything else must agree.
        surplus = single["input_ids"][0] == processor.linguistic_token_id
        torch.testing.assert_close(together[row][real][~surplus], alone[~surplus], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batched_generation_gives_what_single_generation_gives(tiny, padding_side):
    model, processor = tiny
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    # Audio in the batch: the prompt is packed, so even right padding is safe.
    chosen = CONVERSATIONS[:5]
    batch = prepare(processor, chosen, padding_side=padding_side)
    together = model.generate(**batch, **options)
    assert torch.equal(together[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    for row, conversation in enumerate(chosen):
        single = prepare(processor, conversation)
        alone = model.generate(**single, **options)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_beams_and_samples_keep_every_clip_with_its_own_row(tiny):
    """generate repeats rows for beams; with several clips a prompt the clips must be repeated with them."""
    model, processor = tiny
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    batch = prepare(processor, CONVERSATIONS[:4])
    together = model.generate(**batch, num_return_sequences=2, **options)
    assert len(together) == 8
    for row, conversation in enumerate(CONVERSATIONS[:4]):
        alone = model.generate(**prepare(processor, conversation), num_return_sequences=2, **options)
        assert together[2 * row : 2 * row + 2, -5:].tolist() == alone[:, -5:].tolist()


def test_text_only_is_the_bare_llm_bit_for_bit(tiny, tiny_backbones):
    model, processor = tiny
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    inputs = prepare(processor, [[typed("hello to the dog")], [typed("the quick brown fox jumps")]])
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
    ours = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, bare.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_text_sources_are_the_bare_llm_on_the_text_twin(tiny, tiny_backbones):
    model, processor = tiny
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    turn = {"type": "audio", "paralinguistic": "caption", "linguistic": "transcript"}
    turn |= {"caption": "(male voice, happy emotion)", "transcript": "the fox"}
    inputs = prepare(processor, [{"role": "user", "content": [turn]}])
    twin = prepare(processor, [typed("(male voice, happy emotion) the fox")])
    assert torch.equal(inputs["input_ids"], twin["input_ids"])
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare(**twin).logits)


def test_branches_are_independent_of_each_other(tiny):
    """Leaving one branch out does not change what the other contributes."""
    model, processor = tiny
    features = {}
    for name, sources in {
        "both": {},
        "how": {"linguistic": "none"},
        "what": {"paralinguistic": "none"},
    }.items():
        inputs = prepare(processor, [spoken(1.2, 9, **sources)])
        names = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches")
        features[name] = model.get_audio_features(**{key: inputs[key] for key in names})
    torch.testing.assert_close(features["both"].paralinguistic_embeds, features["how"].paralinguistic_embeds)
    torch.testing.assert_close(features["both"].linguistic_embeds, features["what"].linguistic_embeds)
    assert features["how"].linguistic_embeds is None
    assert features["what"].paralinguistic_embeds is None


def test_backbones_are_frozen_and_equal_a_plain_load(tiny, tiny_backbones, tmp_path):
    """After loading, after a training step, after saving and loading: every parameter and buffer, bit for bit."""
    model, processor = make_model(tiny_backbones)
    plain_llm = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    plain_encoder = AutoModel.from_pretrained(tiny_backbones[0]).get_encoder()

    def check(candidate):
        for ours, plain in ((candidate.language_model, plain_llm), (candidate.audio_tower, plain_encoder)):
            expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
            actual = dict(ours.named_parameters()) | dict(ours.named_buffers())
            assert actual.keys() == expected.keys()
            assert "rotary" not in str(list(expected)) or any("inv_freq" in name for name in expected)
            for name, tensor in expected.items():
                assert torch.equal(actual[name], tensor), name
            assert not any(p.requires_grad for p in ours.parameters())

    check(model)
    model.train()
    assert not model.language_model.training
    batch = prepare(processor, [spoken(1.0, 1), typed("the fox", "assistant")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= len(processor.tokenizer) - 2, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert any(name.startswith("paralinguistic") for name in changed)
    assert any(name.startswith("linguistic") for name in changed)
    check(model)
    model.save_pretrained(tmp_path)
    check(type(model).from_pretrained(tmp_path))


def test_every_adapter_weight_gets_a_gradient(paper):
    model, processor = paper
    model.train()
    batch = prepare(processor, [spoken(1.0, 1), typed("the fox", "assistant")])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= len(processor.tokenizer) - 2, -100)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    model.zero_grad()
    model.eval()
    assert not missing


def test_wrong_number_of_placeholders_is_refused(tiny):
    model, processor = tiny
    batch = prepare(processor, [spoken(1.0, 1)])
    batch["input_ids"] = batch["input_ids"][:, :-30]
    batch["attention_mask"] = batch["attention_mask"][:, :-30]
    with pytest.raises(ValueError, match="placeholders, its audio needs"):
        model(**batch)


@pytest.mark.slow
def test_long_audio_is_encoded_whole(tiny):
    """70 s are three chunks of one clip; the last seconds are heard."""
    model, processor = tiny
    audio = tone(70.0, 3)
    cut = audio.copy()
    cut[-8_000:] = 0
    outputs = []
    for samples in (audio, cut):
        inputs = prepare(processor, [{"role": "user", "content": [{"type": "audio", "audio": samples}]}])
        assert inputs["audio_num_chunks"].tolist() == [3]
        with torch.inference_mode():
            _, lengths = model.encode_audio(
                inputs["input_features"], inputs["input_features_mask"], inputs["audio_num_chunks"]
            )
            outputs.append(model(**inputs).logits[0, -1])
        assert lengths.tolist() == [3500]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


def test_placeholders_without_audio_are_refused(tiny):
    model, processor = tiny
    inputs = prepare(processor, [spoken(0.7, 1)])
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="paralinguistic placeholders, its audio needs 0"):
            call(input_ids=inputs["input_ids"])


def test_a_model_that_is_cast_as_a_whole_still_hears(tiny_backbones):
    model, processor = make_model(tiny_backbones, kind="letters")
    inputs = prepare(processor, [spoken(1.0, 1)])
    heard = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    wanted = processor.decode_audio(model.get_audio_features(**heard))
    found = processor.decode_audio(model.to(torch.bfloat16).get_audio_features(**heard))
    for name, labels in wanted[0]["attributes"].items():
        assert found[0]["attributes"][name] == pytest.approx(labels, abs=0.05)


def test_options_of_loading_reach_the_backbones(tiny_backbones, tmp_path):
    """Through the auto classes too, and what is no option is refused: it would be written into every checkpoint."""
    audio, text = tiny_backbones
    model, _ = make_model(tiny_backbones)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path, attn_implementation="eager", torch_dtype=torch.bfloat16
    )
    assert loaded.language_model.config._attn_implementation == "eager"
    assert loaded.audio_tower.config._attn_implementation == "eager"
    assert loaded.language_model.dtype == torch.bfloat16
    assert loaded.paralinguistic_adapter.output.weight.dtype == torch.float32
    made = DualSLMForConditionalGeneration.from_backbones(
        audio, text, attn_implementation="eager", token="hf_secret", cache_dir=str(tmp_path / "cache")
    )
    assert made.language_model.config._attn_implementation == "eager"
    made.save_pretrained(tmp_path / "made")
    assert not {"token", "cache_dir"} & json.loads((tmp_path / "made" / "config.json").read_text()).keys()
    with pytest.raises(TypeError, match="num_paralingustic_tokens is no field of DualSLMConfig"):
        DualSLMForConditionalGeneration.from_backbones(audio, text, num_paralingustic_tokens=32)


def test_a_device_map_is_told_to_pipelines_and_trainers(tiny_backbones):
    """Both look for it on the model that they are given, and move one without it. As accelerate leaves it on an LLM."""
    model, _ = make_model(tiny_backbones)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    model.language_model.hf_device_map = places
    model.attach_backbones(model.audio_tower, model.language_model)
    ours = dict.fromkeys(("audio_tower", "paralinguistic_adapter", "linguistic_adapter"), 0)
    assert model.hf_device_map == ours | {f"language_model.{name}": place for name, place in places.items()}
    single, _ = make_model(tiny_backbones)  # on one device it is moved like any other
    single.language_model.hf_device_map = {"": 0}
    single.attach_backbones(single.audio_tower, single.language_model)
    assert not hasattr(single, "hf_device_map")


def test_a_long_clip_is_encoded_in_groups_of_chunks_with_the_same_result(tiny, monkeypatch):
    model, processor = tiny
    features = processor.extract_features([tone(100.0), tone(3.0, 1)])
    together, lengths = model.encode_audio(**features)
    monkeypatch.setattr(encoder_dual_slm, "GROUP_CHUNKS", 3)  # 4 + 1 chunks
    grouped, again = model.encode_audio(**features)
    assert torch.equal(again, lengths)
    torch.testing.assert_close(grouped, together, atol=1e-5, rtol=1e-4)
