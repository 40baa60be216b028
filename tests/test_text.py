"""Transcripts as CTC writes them, and draws that depend on a key alone."""

import collections

import numpy as np
import pytest

from dual_slm.training.text import (
    bigram_counts,
    hash_uniform,
    normalize,
    nothing_said,
    spelled_out,
    split_by,
    word_counts,
)


def test_only_what_can_be_heard_is_spelled():
    assert normalize("“Well,” she said: it’s TWENTY-SEVEN … o'clock!") == [
        "well",
        "she",
        "said",
        "it's",
        "twenty",
        "seven",
        "o'clock",
    ]


def test_remarks_are_no_words_unless_there_are_words():
    assert nothing_said("(no speech) [noise]") and normalize("(no speech)") == []
    assert not nothing_said("Hello (there)") and normalize("Hello (there)") == ["hello", "there"]
    assert (
        spelled_out("(42)") and spelled_out("It's fine.") and not spelled_out("I am 42") and not spelled_out("schön")
    )
    assert spelled_out("scho\u0308n", " chnsö")  # an accent of its own is composed


def test_words_and_bigrams_are_counted_within_each_text():
    texts = ["The fox.", "the fox, the dog"]
    assert word_counts(texts) == {"the": 3, "fox": 2, "dog": 1}
    assert bigram_counts(texts) == {("the", "fox"): 2, ("fox", "the"): 1, ("the", "dog"): 1}


def test_shares_are_even_and_splits_near_five_percent():
    names = [f"speaker {n}" for n in range(10_000)]
    draws = np.array([hash_uniform(name) for name in names])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(1_000, abs=120)  # 4 standard deviations
    found = collections.Counter(map(split_by, names))
    assert found["validation"] == pytest.approx(500, abs=88) and found["test"] == pytest.approx(500, abs=88)
    assert np.mean([split_by(name) == split_by(name, seed=1) for name in names]) < 0.85  # by chance 0.815


def test_draws_are_those_of_the_released_tables():
    assert hash_uniform("a", 3) == 0.5485868291143228
