"""Tiny random backbones of the real classes, and the real ones from the package index."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.configuration_dual_slm import LETTER_ADAPTER, WARM_START_ADAPTERS
from dual_slm.processing_dual_slm import CaptionSlots
from dual_slm.training.run import put
from dual_slm.training.warm_start import lexicon_rows

torch.set_num_threads(2)

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAPTION = "({gender} voice, {emotion} emotion)"
LABELS = {"gender": ["female", "male"], "emotion": ["neutral", "happy", "sad"]}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        "the quick brown fox jumps over the lazy dog and says hello to a female voice, a sad male voice, happy emotion"
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory) -> tuple[str, str]:
    """Folders of a random Whisper and a random Llama, with feature extractor and tokenizer."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    audio = WhisperModel(
        WhisperConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=3,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            init_std=0.2,  # so that the states depend on the sound, not on the positions alone
        )
    )
    audio.save_pretrained(root / "whisper")
    WhisperFeatureExtractor().save_pretrained(root / "whisper")
    tokenizer = _tokenizer()
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )
    text.save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    return str(root / "whisper"), str(root / "llama")


def make_model(backbones: tuple[str, str], **fields) -> tuple[DualSLMForConditionalGeneration, DualSLMProcessor]:
    """A model with new adapters; `kind="warm"` takes the warm start's adapters, `"letters"` these with words by letters, else
    the paper's."""
    from transformers import AutoTokenizer

    audio, text = backbones
    tokenizer = AutoTokenizer.from_pretrained(text)
    kind = fields.pop("kind", "paper")
    slots = CaptionSlots(tokenizer, CAPTION, LABELS)
    if kind in ("warm", "letters"):
        words = {"linguistic_ctc_vocab_size": 60} if kind == "warm" else LETTER_ADAPTER
        fields = WARM_START_ADAPTERS | {
            "num_paralinguistic_tokens": slots.num_slots,
            "paralinguistic_soft_vocab_size": len(slots.token_ids),
            "paralinguistic_hidden_size": 24,
            **words,
            "linguistic_hidden_size": 40,
            "caption_template": CAPTION,
            "attribute_labels": LABELS,
            **fields,
        }
    else:
        fields = {"num_paralinguistic_tokens": 4, "linguistic_hidden_size": 40, **fields}
    torch.manual_seed(1)
    model = DualSLMForConditionalGeneration.from_backbones(audio, text, **fields)
    if kind in ("warm", "letters"):
        model.paralinguistic_adapter.soft_tokens.token_ids = torch.tensor(slots.token_ids)
    if kind == "letters":
        adapter, words = model.linguistic_adapter, {"the": 9, "fox": 3, "lazy": 2, "dog": 2, "dig": 2, "a": 5, "be": 3}
        pairs = {("the", "fox"): 3, ("lazy", "dog"): 2, ("a", "be"): 3, ("be", "a"): 2, ("a", "fox"): 1}
        put(adapter.lexicon, lexicon_rows(tokenizer, words, pairs, adapter.alphabet))
        model.config.linguistic_lexicon_size = len(adapter.lexicon.counts)
        model.config.linguistic_lexicon_pairs = len(adapter.lexicon.pairs)
        with torch.no_grad():  # random outputs that change from frame to frame, and a blank that wins sometimes
            adapter.letters.weight.normal_(std=2.0)
            adapter.letters.bias[len(adapter.alphabet) :: len(adapter.alphabet) + 1] = 3.0
    elif kind == "warm":
        model.linguistic_adapter.soft_tokens.token_ids = torch.arange(3, 63)
        with torch.no_grad():  # random outputs that change from frame to frame, and a blank that wins sometimes
            model.linguistic_adapter.linear_2.weight.normal_(std=0.5)
            model.linguistic_adapter.soft_tokens.blank.normal_(std=0.6)
    processor = DualSLMProcessor.from_config(model.config, WhisperFeatureExtractor.from_pretrained(audio), tokenizer)
    return model, processor


@pytest.fixture(scope="session", params=["paper", "warm", "letters"])
def tiny(request, tiny_backbones):
    """(model, processor), once with the paper's adapters, once with the warm start's and once with letters."""
    return make_model(tiny_backbones, kind=request.param)


@pytest.fixture(scope="session")
def paper(tiny_backbones):
    return make_model(tiny_backbones, kind="paper")


@pytest.fixture(scope="session")
def warm(tiny_backbones):
    return make_model(tiny_backbones, kind="warm")


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    """A wandering tone with noise, 16 kHz: no speech, but never the same twice."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = 120 + 80 * rng.random() + 40 * np.sin(2 * np.pi * (0.5 + rng.random()) * time)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.02 * rng.standard_normal(len(time))).astype(
        np.float32
    )
