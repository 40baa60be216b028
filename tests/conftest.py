"""Tiny random backbones of the real classes, and the real ones from the package index."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker, and for the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import datasets
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
from dual_slm.captions_dual_slm import CaptionSlots
from dual_slm.configuration_dual_slm import WARM_START_ADAPTERS
from dual_slm.letters_dual_slm import lexicon_rows
from dual_slm.training.forward import load_state

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Real speech beside the checkout. A user has none: tests of it are skipped then.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

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
    """A model with new adapters; `kind="letters"` takes those of the warm start, else the paper's."""
    from transformers import AutoTokenizer

    audio, text = backbones
    tokenizer = AutoTokenizer.from_pretrained(text)
    kind = fields.pop("kind", "paper")
    slots = CaptionSlots(tokenizer, CAPTION, LABELS)
    fields = {"linguistic_hidden_size": 40, **fields}
    if kind == "letters":
        fields = WARM_START_ADAPTERS | {
            "num_paralinguistic_tokens": slots.num_slots,
            "paralinguistic_soft_vocab_size": len(slots.token_ids),
            "paralinguistic_hidden_size": 24,
            "caption_template": CAPTION,
            "attribute_labels": LABELS,
            **fields,
        }
    else:
        fields = {"num_paralinguistic_tokens": 4, **fields}
    torch.manual_seed(1)
    model = DualSLMForConditionalGeneration.from_backbones(audio, text, **fields)
    if kind == "letters":
        model.paralinguistic_adapter.soft_tokens.choose(slots.token_ids, model.get_input_embeddings())
        fill_lexicon(model, tokenizer)
        adapter = model.linguistic_adapter
        with torch.no_grad():  # random outputs that change from frame to frame, and a blank that wins sometimes
            adapter.letters.weight.normal_(std=2.0)
            adapter.letters.bias[len(adapter.alphabet) :: len(adapter.alphabet) + 1] = 3.0
    processor = DualSLMProcessor.from_config(model.config, WhisperFeatureExtractor.from_pretrained(audio), tokenizer)
    return model, processor


def fill_lexicon(model: DualSLMForConditionalGeneration, tokenizer) -> None:
    """A few words and bigrams for character CTC."""
    lexicon = model.linguistic_adapter.lexicon
    words = {"the": 9, "fox": 3, "lazy": 2, "dog": 2, "dig": 2, "a": 5, "be": 3}
    bigrams = {("the", "fox"): 3, ("lazy", "dog"): 2, ("a", "be"): 3, ("be", "a"): 2, ("a", "fox"): 1}
    load_state(lexicon, lexicon_rows(tokenizer, words, bigrams, model.linguistic_adapter.alphabet))
    model.config.linguistic_lexicon_size = len(lexicon.counts)
    model.config.linguistic_lexicon_pairs = len(lexicon.pairs)


@pytest.fixture(scope="session", params=["paper", "letters"])
def tiny(request, tiny_backbones):
    """(model, processor), once with the paper's adapters and once with those of the warm start."""
    return make_model(tiny_backbones, kind=request.param)


@pytest.fixture(scope="session")
def paper(tiny_backbones):
    return make_model(tiny_backbones, kind="paper")


@pytest.fixture(scope="session")
def letters(tiny_backbones):
    return make_model(tiny_backbones, kind="letters")


@pytest.fixture
def table_cache(tmp_path, monkeypatch):
    """Tables are read through a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def run_cli(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`dual-slm` in a process of its own."""
    command = [sys.executable, "-m", "dual_slm.training.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, **options)


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    """A wandering tone with noise, 16 kHz: no speech, but never the same twice."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = 120 + 80 * rng.random() + 40 * np.sin(2 * np.pi * (0.5 + rng.random()) * time)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.02 * rng.standard_normal(len(time))).astype(
        np.float32
    )


def spoken(seconds: float, seed: int = 0, text: str | None = None, **sources) -> dict:
    content = [{"type": "audio", "audio": tone(seconds, seed), **sources}]
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def typed(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def prepare(processor, conversation, **options):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


CONVERSATIONS = [
    [spoken(0.7, 1)],
    [typed("hello to the lazy dog")],
    [spoken(2.3, 2, "the quick brown fox"), typed("a dog", "assistant"), spoken(0.31, 3)],
    [typed("be brief", "system"), typed("the fox"), typed("jumps", "assistant"), spoken(1.4, 4)],
    [spoken(1.1, 5, paralinguistic="none")],
    [spoken(1.3, 6, paralinguistic="caption", caption="(female voice, sad emotion)")],
    [spoken(0.9, 7, linguistic="transcript", transcript="the lazy fox")],
    [spoken(1.0, 8, linguistic="none")],
]
