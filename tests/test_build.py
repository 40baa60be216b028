"""The model of a recipe: new adapters, checkpoints that training continues, and what stage 0 takes over."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from world import world

from conftest import make_model, tone
from dual_slm import DualSLMForConditionalGeneration
from dual_slm.configuration_dual_slm import WARM_START_ADAPTERS
from dual_slm.training.build import adapter_defaults, check_stage_0, fit_dtype, take_linguistic
from dual_slm.training.build import make_model as training_model
from dual_slm.training.forward import load_state
from dual_slm.training.recipe import ModelRecipe, load_recipe


def save(model, processor, folder) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_adapters_stand_for_fields_of_the_configuration(tiny_backbones, tmp_path):
    assert adapter_defaults(ModelRecipe(adapters="paper")) == {}
    assert adapter_defaults(ModelRecipe()) == WARM_START_ADAPTERS is not adapter_defaults(ModelRecipe())
    model, processor = training_model(load_recipe(str(world(tmp_path, tiny_backbones))))
    slots = processor.caption_slots
    assert model.config.linguistic_adapter_type == "letters"
    assert model.config.num_paralinguistic_tokens == slots.num_slots
    assert model.paralinguistic_adapter.soft_tokens.token_ids.tolist() == slots.token_ids


def test_a_checkpoint_is_taken_as_it_is_and_beside_a_config_refused(tiny_backbones, tmp_path):
    model, processor = make_model(tiny_backbones, kind="letters")
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    recipe.model.start_from, recipe.model.config = save(model, processor, tmp_path / "ckpt"), {}
    taken, other = training_model(recipe)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in taken.state_dict().items())
    assert other.caption_slots.token_ids == processor.caption_slots.token_ids
    recipe.model.config = {"paralinguistic_soft_residual": True}
    with pytest.raises(ValueError, match=r"paralinguistic_soft_residual .*the checkpoint has a config of its own"):
        training_model(recipe)


def test_a_residual_starts_as_nothing_and_learns(tiny_backbones, tmp_path):
    """The same embeddings as without it, until it is trained."""
    model, processor = make_model(tiny_backbones, kind="letters")
    more, _ = make_model(tiny_backbones, kind="letters", paralinguistic_soft_residual=True)
    load_state(more, model.state_dict())
    inputs = processor.extract_features([tone(0.8)])
    with torch.inference_mode():
        before, after = (m.get_audio_features(**inputs).paralinguistic_embeds for m in (model, more))
    assert torch.equal(before, after)
    more.paralinguistic_adapter.residual.weight.data.normal_()
    more.save_pretrained(tmp_path / "with")
    loaded = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "with")
    with torch.inference_mode():
        changed, again = (m.get_audio_features(**inputs).paralinguistic_embeds for m in (more, loaded))
    assert torch.equal(changed, again)
    assert not torch.equal(changed, before)


def test_stage_0_goes_on_from_the_words_of_a_checkpoint_that_fits(tiny_backbones, tmp_path):
    """Words are taken over bit for bit, the paralinguistic adapter is new; another encoder, alphabet or shape is refused."""
    model, _ = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(tmp_path / "ckpt")
    other, _ = make_model(tiny_backbones, kind="letters")
    for parameter in other.parameters():
        parameter.data += 0.1
    fresh = [p.clone() for p in other.paralinguistic_adapter.parameters()]
    take_linguistic(other, tmp_path / "ckpt")
    taken = other.linguistic_adapter.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in model.linguistic_adapter.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(fresh, other.paralinguistic_adapter.parameters(), strict=True))
    narrow, _ = make_model(tiny_backbones, kind="letters", linguistic_hidden_size=8)
    with pytest.raises(ValueError, match=r"does not fit the recipe in .*linear_1"):
        take_linguistic(narrow, tmp_path / "ckpt")
    letters, _ = make_model(tiny_backbones, kind="letters", linguistic_letters=" zyxwvutsrqponmlkjihgfedcba'")
    with pytest.raises(ValueError, match="writes in other letters"):
        take_linguistic(letters, tmp_path / "ckpt")
    other.config.audio_model_fingerprint = "another"
    with pytest.raises(ValueError, match="trained with another audio backbone"):
        take_linguistic(other, tmp_path / "ckpt")


def test_a_lexicon_without_bigrams_is_taken_too(tiny_backbones, tmp_path):
    """As it was written before there were bigrams."""
    model, _ = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in state.items() if "pairs" not in n}, tmp_path / "model.safetensors")
    take_linguistic(model, tmp_path)
    words, bigrams = model.linguistic_adapter.lexicon.known(model.config.linguistic_letters)
    assert "fox" in words and not bigrams


def test_stage_0_is_refused_for_adapters_that_it_cannot_teach(tiny_backbones, tmp_path):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    model, _ = make_model(tiny_backbones, kind="paper")
    with pytest.raises(ValueError, match=r"give a model\.config\.caption_template"):
        check_stage_0(recipe, model.config)
    recipe.warm_start.caption_steps = 0
    with pytest.raises(ValueError, match="linguistic_adapter_type is concat"):
        check_stage_0(recipe, model.config)
    recipe.warm_start.enabled = False
    check_stage_0(recipe, model.config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
def test_a_recipe_in_bfloat16_is_in_float32_where_the_cpu_is_slow_in_it(tiny_backbones, tmp_path, monkeypatch):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)), ["model.dtype=bfloat16", "train.bf16=true"])
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("dual_slm.training.hardware.cpu_has_bfloat16", lambda fast=fast: fast)
        fitted = fit_dtype(recipe)
        assert (fitted.model.dtype, fitted.train.bf16) == (dtype, fast)
    assert recipe.train.bf16 and recipe.model.dtype == "bfloat16"


def small_blocks(backbones: tuple[str, str], folder) -> tuple[str, str]:
    """The backbones with an LLM of whole blocks, which bitsandbytes's CPU kernel needs."""
    shutil.copytree(backbones[1], folder)
    config = LlamaConfig.from_pretrained(backbones[1])
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(folder)
    return backbones[0], str(folder)


def test_gradients_go_through_an_llm_in_4_bits_also_after_an_evaluation(tiny_backbones, tmp_path):
    """bitsandbytes's NF4 for the LLM alone. On some CPUs it repacks the weights in a pass without gradients."""
    backbones = small_blocks(tiny_backbones, tmp_path / "llama")
    settings = ["model.load_in_4bit=true", "model.dtype=bfloat16"]
    model, _ = training_model(load_recipe(str(world(tmp_path, backbones)), settings))
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantised) == 2 * 7  # all of both decoder layers
    assert all(name.startswith("language_model.") for name in quantised)
    inputs, gradients = torch.randn(2, 5, 64, dtype=torch.bfloat16), []
    for _ in range(2):
        embeds = inputs.clone().requires_grad_()
        model.language_model(inputs_embeds=embeds).logits.float().logsumexp(-1).sum().backward()
        gradients.append(embeds.grad)
        with torch.no_grad():
            model.language_model(inputs_embeds=inputs)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
