"""The configuration: the paper's defaults, presets of the right size, a round trip, refusals."""

import pytest
import torch

from dual_slm import DualSLMConfig, DualSLMForConditionalGeneration


@pytest.mark.parametrize(
    ("preset", "paralinguistic", "linguistic", "encoder", "llm"),
    [
        # Paralinguistic: one layer of width 1280 (4 d^2 + 4 d attention, 8 d^2 + 5 d feed-forward, 4 d norms) and a linear
        # layer. Linguistic: 5 * 1280 -> 2048 -> width. Encoder and LLM: the published sizes.
        ("slm_qwen", 12 * 1280**2 + 13 * 1280 + 1281 * 3584, 6401 * 2048 + 2049 * 3584, 637.0, 7615.6),
        ("slm_llama", 12 * 1280**2 + 13 * 1280 + 1281 * 4096, 6401 * 2048 + 2049 * 4096, 637.0, 8030.3),
    ],
)
def test_presets_have_the_papers_adapters(preset, paralinguistic, linguistic, encoder, llm):
    with torch.device("meta"):
        model = DualSLMForConditionalGeneration(getattr(DualSLMConfig, preset)())

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.paralinguistic_adapter) == paralinguistic
    assert count(model.linguistic_adapter) == linguistic
    assert count(model.audio_tower) / 1e6 == pytest.approx(encoder, abs=0.05)
    assert count(model.language_model) / 1e6 == pytest.approx(llm, abs=0.05)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == paralinguistic + linguistic


def test_defaults_are_the_papers():
    config = DualSLMConfig.slm_qwen()
    assert (config.paralinguistic_num_layers, config.paralinguistic_num_heads) == (1, 8)
    assert (config.paralinguistic_dropout, config.paralinguistic_pooling) == (0.1, "adaptive")
    assert (config.linguistic_downsample_rate, config.linguistic_hidden_size) == (5, 2048)
    assert not (config.paralinguistic_slot_vectors or config.paralinguistic_layer_mix or config.linguistic_input_norm)
    assert (config.linguistic_adapter_type, config.paralinguistic_soft_vocab_size) == ("concat", 0)
    assert (config.paralinguistic_token_id, config.linguistic_token_id) == (151665, 151666)


def test_every_field_survives_a_round_trip(tmp_path):
    config = DualSLMConfig.slm_smollm2(caption_template="({gender})", attribute_labels={"gender": ["female", "male"]})
    config.save_pretrained(tmp_path)
    loaded = DualSLMConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert type(loaded.audio_config).__name__ == "WhisperConfig"
    for name in ours.keys() - {"transformers_version", "auto_map", "_name_or_path"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_padding": "none"}, "encoder_padding is 'none'; it must be one of max_length, real"),
        ({"paralinguistic_pooling": "max"}, "must be one of adaptive, statistics"),
        ({"num_paralinguistic_tokens": 0}, "num_paralinguistic_tokens is 0"),
        ({"linguistic_letters": "abc"}, "it begins with the space"),
        ({"linguistic_letters": " aa"}, "each lower-case letter once"),
        ({"linguistic_hidden_size": 30}, "a linguistic_hidden_size that is a multiple of 8, not 30"),
        ({"linguistic_ctc_vocab_size": 9}, "field of version 0.1 that this version cannot run"),
        ({"lora_only_with_audio": True}, "dual-slm 0.1.0"),
        ({"paralinguistic_num_heads": 7, "paralinguistic_num_layers": 1}, "no multiple of paralinguistic_num_heads=7"),
        (
            {"paralinguistic_layer_concat": True, "paralinguistic_num_layers": 1},
            "it needs paralinguistic_adapter_type: pooling",
        ),
        ({"paralinguistic_layer_concat": True, "paralinguistic_adapter_type": "query"}, "side by side"),
        ({"paralinguistic_adapter_type": "query"}, "no soft tokens: leave out caption_template"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DualSLMConfig.slm_smollm2(**fields)
