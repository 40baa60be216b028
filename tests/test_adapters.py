"""The adapters apart from the model: pooling by the real length, soft tokens, residuals."""

import torch

from conftest import make_model, tone
from dual_slm.adapters_dual_slm import masked_adaptive_average, masked_statistics


def test_masked_adaptive_average_equals_torchs_on_each_length():
    torch.manual_seed(0)
    lengths = torch.tensor([1, 3, 7, 16, 40])
    states = torch.randn(5, 40, 6)
    pooled = masked_adaptive_average(states, lengths, 7)
    for row, length in enumerate(lengths):
        expected = torch.nn.functional.adaptive_avg_pool1d(states[row, :length].T[None], 7)[0].T
        torch.testing.assert_close(pooled[row], expected)


def test_a_new_residual_adds_nothing(tiny_backbones):
    """A fresh model with it says what it would say without."""
    plain, processor = make_model(tiny_backbones, kind="letters")
    model, _ = make_model(tiny_backbones, kind="letters", paralinguistic_soft_residual=True)
    adapter = model.paralinguistic_adapter
    assert not adapter.residual.weight.any()
    assert adapter.residual.weight.requires_grad
    adapter.load_state_dict(plain.paralinguistic_adapter.state_dict(), strict=False)
    inputs = processor.extract_features([tone(1.2, 3)])
    with torch.inference_mode():
        features, expected = model.get_audio_features(**inputs), plain.get_audio_features(**inputs)
    assert torch.equal(features.paralinguistic_embeds, expected.paralinguistic_embeds)


def test_soft_tokens_have_the_scale_of_the_llms_own_embeddings(tiny_backbones, tmp_path):
    """Gemma's embedding layer multiplies what it looks up."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones[1])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = make_model((tiny_backbones[0], str(tmp_path)), kind="letters")
    soft, embedding = model.paralinguistic_adapter.soft_tokens, model.get_input_embeddings()
    torch.testing.assert_close(soft.rows(embedding), embedding(soft.token_ids))


def test_dynamics_tell_fast_change_from_slow():
    """The same frames in another order have the same mean and deviation, and other steps; padding does not count."""
    ramp = torch.linspace(-1, 1, 40)
    shuffled = ramp[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    states = torch.zeros(2, 1, 50, 3)
    states[:, 0, :40] = torch.stack([ramp, shuffled])[..., None]
    states[:, 0, 40:] = 9.0
    smooth, rough = masked_statistics(states, torch.tensor([40, 40]), dynamics=True)[:, 0, 6:]
    torch.testing.assert_close(smooth, torch.full((3,), 2 / 39))
    assert (rough > 5 * smooth).all()
    plain = masked_statistics(states, torch.tensor([40, 40]))
    torch.testing.assert_close(plain[0], plain[1])
