"""Ears without the LLM hear what the whole model hears, in batches, once."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from conftest import make_model, tone
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.backbones_dual_slm import BackboneSource, load_backbones
from dual_slm.training.serving.ears import Ears, Heard
from served import wav

pytest_plugins = ["serving_fixtures"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_backbones):
    """A folder and its whole model, with letters."""
    folder = tmp_path_factory.mktemp("ears")
    model, processor = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, DualSLMForConditionalGeneration.from_pretrained(folder), processor


@pytest.fixture
def ears(checkpoint):
    folder = checkpoint[0]
    deaf = DualSLMForConditionalGeneration.from_pretrained(folder, ears_only=True)
    ears = Ears(deaf, DualSLMProcessor.from_pretrained(folder))
    yield ears
    ears.close()


def test_of_the_llm_only_the_embedding_matrix_is_there(checkpoint, ears):
    _, whole, _ = checkpoint
    sizes = {name: p.numel() for name, p in ears.model.language_model.named_parameters()}
    embedding = whole.get_input_embeddings().weight
    assert sizes == {"embed_tokens.weight": embedding.numel(), "norm.weight": embedding.shape[1]}
    assert torch.equal(ears.model.get_input_embeddings().weight, embedding)


def test_it_hears_what_the_whole_model_hears(checkpoint, ears):
    """Words, probabilities, and the positions that the LLM of the whole model reads."""
    _, whole, processor = checkpoint
    for seed, seconds in enumerate((0.4, 1.7, 3.1)):
        clip = tone(seconds, seed)
        (heard,) = ears.hear([clip])
        inputs = processor(text="<|audio|>", audio=[clip], add_special_tokens=False)
        features = whole.get_audio_features(**{name: inputs[name] for name in processor.model_input_names[2:]})
        (expected,) = processor.decode_audio(features)
        assert heard.words == expected["heard"]
        for name, labels in expected["attributes"].items():
            assert heard.attributes[name] == pytest.approx(labels, abs=1e-5)
        embeds, tokens = heard.positions()
        merged, mask = whole.merge_audio(inputs["input_ids"], None, features)
        torch.testing.assert_close(embeds, merged[0][mask[0].bool()], atol=1e-5, rtol=1e-4)
        slots = processor.num_paralinguistic_tokens
        assert tokens == [None] * slots + features.linguistic_token_ids.tolist()
        words = torch.tensor(tokens[slots:], dtype=torch.long)
        torch.testing.assert_close(whole.get_input_embeddings()(words), embeds[slots:])
        assert (heard.seconds, heard.num_frames) == (pytest.approx(seconds), processor.num_frames(len(clip)))


def test_ears_that_only_hear_do_not_generate(ears):
    with pytest.raises(AttributeError, match="logits"):
        ears.model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_clips_that_wait_are_heard_in_one_batch_like_single_ones(checkpoint, ears, monkeypatch):
    clips = [tone(0.5 + 0.3 * n, 10 + n) for n in range(6)]
    sizes, started, go = [], threading.Event(), threading.Event()
    encode = ears._encode

    def counted(batch):
        started.set()
        go.wait(20)
        sizes.append(len(batch))
        return encode(batch)

    monkeypatch.setattr(ears, "_encode", counted)
    first = ears.submit(tone(0.3, 99))
    started.wait(20)
    futures = [ears.submit(clip) for clip in [*clips, clips[2]]]  # one clip twice
    left = ears.submit(tone(0.4, 98))
    assert left.cancel()  # whoever asked has gone
    go.set()
    first.result()
    together = [future.result() for future in futures]
    assert sizes == [1, 6]
    assert together[6] is together[2]
    alone = Ears(checkpoint[1], checkpoint[2])
    for clip, heard in zip(clips, together, strict=False):
        (single,) = alone.hear([clip])
        assert heard.words == single.words
        torch.testing.assert_close(heard.positions()[0], single.positions()[0], atol=1e-4, rtol=1e-3)
    alone.close()


def test_a_batch_ends_before_its_padding_grows_too_long(ears, monkeypatch):
    monkeypatch.setattr("dual_slm.training.serving.ears.BATCH_SECONDS", 3.0)
    rate = ears.processor.sampling_rate
    waiting = [(np.zeros(int(seconds * rate), np.float32), None) for seconds in (1, 1, 2, 4, 0.5)]
    taken = Ears.__new__(Ears)
    taken.__dict__ |= vars(ears) | {"_next": None, "_waiting": type(ears._waiting)()}
    for item in waiting:
        taken._waiting.put(item)
    lengths = [[len(clip) / rate for clip, _ in taken._take()] for _ in range(3)]
    assert lengths == [[1, 1], [2], [4]]  # a clip longer than the limit goes alone


def test_the_cache_remembers_the_newest_clips_within_its_size(ears):
    ears.hear([tone(1.0, 1)])
    one = ears.cached_bytes
    ears.cache_bytes = int(2.5 * one)
    ears.hear([tone(1.0, 2)])
    ears.hear([tone(1.0, 1)])  # the oldest is now the second
    assert (ears.hits, ears.misses) == (1, 2)
    ears.hear([tone(1.0, 3)])
    assert ears.cached_bytes <= ears.cache_bytes
    ears.hear([tone(1.0, 1)])
    assert ears.hits == 2
    ears.hear([tone(1.0, 2)])
    assert (ears.hits, ears.misses) == (2, 4)


def test_an_error_of_a_batch_reaches_whoever_waits_and_the_thread_goes_on(ears, monkeypatch):
    encode = ears._encode
    monkeypatch.setattr(ears, "_encode", lambda clips: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ears.hear([tone(0.5, 1)])
    monkeypatch.setattr(ears, "_encode", encode)
    assert ears.hear([tone(0.5, 1)])[0].words is not None
    with pytest.raises(ValueError, match="there are no samples"):
        ears.submit(np.zeros(0, np.float32))


def test_a_checkpoint_without_letters_gives_embeddings_alone(paper):
    ears = Ears(*paper)
    (heard,) = ears.hear([wav(1.2)])
    embeds, tokens = heard.positions()
    slots = paper[1].num_paralinguistic_tokens + paper[1].num_linguistic_tokens(int(1.2 * 16_000))
    assert tokens == [None] * slots and embeds.shape == (slots, 48)
    assert (heard.words, heard.attributes, heard.labels()) == (None, None, {})
    only = heard.select(paralinguistic=True, linguistic=False)
    assert only.linguistic_embeds is None and only.linguistic_lengths is None
    assert only.paralinguistic_embeds is heard.features.paralinguistic_embeds
    ears.close()


def test_no_label_is_named_unless_it_beats_all_others_together():
    attributes = {"gender": {"female": 0.9, "male": 0.1}, "emotion": {"sad": 0.4, "happy": 0.35, "neutral": 0.25}}
    heard = Heard(None, "hello", attributes, 5, 0.1)
    assert heard.labels() == {"gender": "female", "emotion": "unsure"}
    assert heard.to_dict() == {"heard": "hello", "attributes": heard.labels(), "probabilities": attributes}


SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED, tie_word_embeddings=False),
        Qwen3Config(**GROUPED, use_sliding_window=True, max_window_layers=1),
        Gemma3TextConfig(**GROUPED),  # scales what it looks up, and has two kinds of layers
        GPTNeoXConfig(**SIZES, intermediate_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_the_embeddings_of_any_llm_are_read_alone(config, tiny_backbones, tmp_path):
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    sources = (BackboneSource(tiny_backbones[0]), BackboneSource(str(tmp_path)))
    _, alone, _ = load_backbones(*sources, {"dtype": torch.float32}, ears_only=True)
    tokens = torch.arange(100)
    assert torch.equal(alone.get_input_embeddings()(tokens), whole.get_input_embeddings()(tokens))
    assert sum(p.numel() for p in alone.parameters()) <= 100 * 32 + 64  # and a norm


def test_a_checkpoint_with_lora_hears_without_it(tiny_backbones, tmp_path):
    pytest.importorskip("peft")
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    model, processor = make_model(tiny_backbones, kind="letters", lora_config=lora)
    model.save_pretrained(tmp_path)
    deaf = DualSLMForConditionalGeneration.from_pretrained(tmp_path, ears_only=True)
    ears, whole = Ears(deaf, processor), Ears(model, processor)
    clips = [tone(0.4, seed) for seed in range(8)]
    pairs = list(zip(ears.hear(clips), whole.hear(clips), strict=True))
    for one, other in pairs:
        assert one.words == other.words
        torch.testing.assert_close(one.positions()[0], other.positions()[0], atol=1e-5, rtol=1e-4)
    ears.close()
    whole.close()
