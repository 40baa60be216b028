"""Character CTC: the beam search against its definition, the language model, the spelling of words."""

import collections
import itertools
import math

import pytest
import torch

from conftest import make_model
from dual_slm.configuration_dual_slm import ALPHABET
from dual_slm.letters_dual_slm import lexicon_rows

WORDS = {"the": 9, "fox": 3, "lazy": 2, "dog": 2, "extraordinarily": 1, "über": 4}
BIGRAMS = {("the", "fox"): 3, ("lazy", "dog"): 2, ("the", "dog"): 2, ("fox", "dog"): 1, ("the", "cat"): 5}


def test_the_search_finds_the_text_that_all_paths_together_make_most_likely(tiny_backbones):
    """Against the definition: every path of six outputs over three letters, summed over those that collapse to a text."""
    model, _ = make_model(tiny_backbones, kind="letters", linguistic_letters=" abe", linguistic_beam_width=500)
    adapter, generator = model.linguistic_adapter, torch.Generator().manual_seed(0)
    words, texts = adapter.words(), set()
    assert set(words.unigrams) == {"a", "be"} and set(words.bigrams) == {("a", "be"), ("be", "a")}
    for _ in range(12):
        log_probs = torch.randn(6, 5, generator=generator).clamp(-1.5).log_softmax(-1)
        totals = collections.defaultdict(list)
        for path in itertools.product(range(5), repeat=6):
            text = "".join(" abe"[i] for i, _ in itertools.groupby(path) if i < 4)
            if not text.startswith(" ") and "  " not in text:
                totals[text].append(sum(log_probs[t, i].item() for t, i in enumerate(path)))
        scores = {
            text: torch.tensor(paths).logsumexp(0).item()
            + sum(words.score(*pair) for pair in itertools.pairwise(["", *text.split()]))
            for text, paths in totals.items()
        }
        texts.add(adapter.search(log_probs, words))
        assert adapter.search(log_probs, words) == max(scores, key=scores.get).strip()
    assert len(texts) > 3


def test_letters_are_spelled_into_words_that_are_known_and_others_as_they_are_heard(tiny_backbones):
    """What sounds like a known word becomes it, a clear new name stays; the LLM gets its own tokens of known words."""
    model, processor = make_model(tiny_backbones, kind="letters")
    adapter = model.linguistic_adapter

    def heard(*outputs: dict[str, float]) -> str:
        probabilities = torch.full((len(outputs), len(adapter.alphabet) + 1), 1e-6)
        for row, letters in zip(probabilities, outputs, strict=True):
            for letter, probability in letters.items():
                row[adapter.alphabet.find(letter) if letter != "_" else -1] = probability
        return adapter.search((probabilities / probabilities.sum(-1, keepdim=True)).log(), adapter.words())

    def clear(text: str) -> list[dict[str, float]]:
        return [{letter: 1.0} for letter in text]

    assert heard(*clear("the f"), {"u": 0.6, "o": 0.4}, *clear("x_")) == "the fox"
    assert heard(*clear("the z"), {"u": 0.6, "o": 0.4}, *clear("x_")) == "the zux"
    assert heard(*clear("ddo_gg")) == "dog"
    assert heard(*clear("d_d")) == "dd"
    assert heard(*clear("____")) == ""
    assert heard(*[{"_": 0.99, "a": 0.005}] * 600) == ""  # noise, however long
    assert heard(*clear("the d"), {"i": 0.6, "o": 0.4}, *clear("g_")) == "the dig"  # both words are as common
    assert heard(*clear("lazy d"), {"i": 0.6, "o": 0.4}, *clear("g_")) == "lazy dog"  # which follows more often
    assert heard(*clear("lazy d"), {"i": 0.99, "o": 0.01}, *clear("g_")) == "lazy dig"
    processor.set_hotwords(model, ["Zux", "zox-trap"])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zox"
    assert heard(*clear("the z"), {"u": 0.9, "o": 0.1}, *clear("x_")) == "the zux"
    processor.set_hotwords(model, ["zux"])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zux"
    with pytest.raises(ValueError, match="the hotword 'r2d2' is not in the letters"):
        processor.set_hotwords(model, ["R2D2"])
    processor.set_hotwords(model, [])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zox"
    tokens = adapter.words().tokens("the fox zuxy")
    assert tokens[:2] == processor.tokenizer(" the fox", add_special_tokens=False)["input_ids"][: len(tokens[:2])]
    assert processor.tokenizer.decode(tokens) == " the fox zuxy"


def test_the_words_that_may_follow_a_word_have_all_of_its_probability(tiny_backbones):
    model, _ = make_model(tiny_backbones, kind="letters")
    words = model.linguistic_adapter.words()
    for before in ("", "the", "lazy", "fox", "a", "unheard"):
        following = [math.exp((words.score(before, word) - words.bonus) / words.weight) for word in words.unigrams]
        assert sum(following) == pytest.approx(1, abs=1e-6)
    assert words.score("lazy", "dog") > words.score("", "dog") > words.score("lazy", "dig")


def test_an_empty_lexicon_says_what_fills_it(tiny_backbones):
    model, _ = make_model(tiny_backbones, kind="letters")
    for name, buffer in dict(model.linguistic_adapter.lexicon.named_buffers()).items():
        setattr(model.linguistic_adapter.lexicon, name, buffer[:0])
    with pytest.raises(ValueError, match="Stage 0 of training fills it"):
        model.linguistic_adapter.words().tokens("fox")


def test_a_lexicon_has_words_that_are_said_and_tokens_that_spell_others(letters, monkeypatch):
    model, processor = letters
    rows = lexicon_rows(processor.tokenizer, WORDS, BIGRAMS, ALPHABET)
    lexicon = model.linguistic_adapter.lexicon
    assert {name: tensor.dtype for name, tensor in rows.items()} == {
        name: tensor.dtype for name, tensor in lexicon.named_buffers()
    }
    spelled = ["".join(ALPHABET[i - 1] for i in spelling if i) for spelling in rows["spellings"].tolist()]
    assert spelled == sorted(set(spelled)) and set(ALPHABET[1:]) <= set(spelled)
    counts = dict(zip(spelled, rows["counts"].tolist(), strict=True))
    assert {word: count for word, count in counts.items() if count} == {
        f" {word}": count for word, count in WORDS.items() if word != "über"
    }
    for spelling, ids in zip(spelled, rows["token_ids"].tolist(), strict=True):
        ids = [token for token in ids if token >= 0]
        assert processor.tokenizer.decode(ids) == spelling or (not ids and spelling == " extraordinarily")
    pairs = [(spelled[a][1:], spelled[b][1:], count) for a, b, count in rows["pairs"].tolist()]
    assert pairs == [("the", "fox", 3), ("lazy", "dog", 2), ("the", "dog", 2)]  # by count, then by letters
    monkeypatch.setattr("dual_slm.letters_dual_slm.MAX_BIGRAMS", 2)
    assert len(lexicon_rows(processor.tokenizer, WORDS, BIGRAMS, ALPHABET)["pairs"]) == 2
