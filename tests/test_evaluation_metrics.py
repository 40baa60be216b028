"""Metrics agree with scikit-learn, jiwer and calculations by hand; intervals are over speakers."""

import random
from collections import Counter
from pathlib import Path

import jiwer
import numpy as np
import pytest
from evaluated import SENTENCES
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from dual_slm.training.evaluation import metrics

MODULES = Path(metrics.__file__).parent / "modules"


@pytest.mark.parametrize("seed", range(8))
def test_figures_of_labels_are_those_of_sklearn(seed):
    rng, labels = random.Random(seed), ["a", "b", "c", "d", "e"]
    true = [rng.choice(labels[: rng.choice([3, 4])]) for _ in range(60)]  # "e" never occurs
    parsed = [rng.choice([t, t, *labels, None]) for t in true]
    occurring, named = sorted(set(true)), [p or "unparsed" for p in parsed]
    matrix = metrics.confusion(zip(true, parsed, strict=True), labels)
    options = {"labels": occurring, "zero_division": 0}
    assert metrics.accuracy(matrix) == pytest.approx(accuracy_score(true, named))
    assert metrics.unweighted_accuracy(matrix) == pytest.approx(recall_score(true, named, average="macro", **options))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert metrics.unweighted_accuracy(matrix) == pytest.approx(balanced_accuracy_score(true, named))
    assert metrics.macro_f1(matrix) == pytest.approx(f1_score(true, named, average="macro", **options))
    assert metrics.weighted_f1(matrix) == pytest.approx(f1_score(true, named, average="weighted", **options))
    assert metrics.unparsed(matrix) == pytest.approx(parsed.count(None) / 60)
    assert metrics.majority(matrix) == pytest.approx(max(Counter(true).values()) / 60)


def test_calibration_error_by_hand():
    """Bin 9: confidences 2.9, two right; bin 1: 0.15, none right."""
    tally = metrics.calibration([(0.95, True), (0.95, False), (1.0, True), (0.15, False)])
    assert metrics.calibration_error(tally) == pytest.approx((0.9 + 0.15) / 4)


def test_intervals_are_over_speakers():
    right_and_wrong = np.array([[10, 10], [0, 10]])
    assert metrics.bootstrap(right_and_wrong, metrics.ratio) == (0.0, 1.0)
    assert metrics.bootstrap(np.array([[3, 10]] * 5), metrics.ratio) == (0.3, 0.3)
    assert metrics.bootstrap(right_and_wrong[:1], metrics.ratio) is None
    many = np.random.default_rng(0).integers(1, [[50, 99]], size=(9, 2))
    assert metrics.bootstrap(many, metrics.ratio, seed=3) == metrics.bootstrap(many, metrics.ratio, seed=3)
    assert metrics.bootstrap(many, metrics.ratio, seed=3) != metrics.bootstrap(many, metrics.ratio, seed=4)
    assert metrics.bootstrap(many, metrics.ratio, baseline=many) == (0.0, 0.0)
    worse = np.stack([many.sum(1), many[:, 1]], axis=1)  # one error more a word, whoever is drawn
    assert metrics.bootstrap(worse, metrics.ratio, baseline=many) == pytest.approx((1, 1))


def test_modules_of_evaluate_agree_with_jiwer_and_sklearn():
    import evaluate as library

    heard = [s.replace("the", "a").upper() for s in SENTENCES]
    found = library.load(str(MODULES / "asr_wer")).compute(predictions=heard, references=SENTENCES)
    assert found["wer"] == pytest.approx(jiwer.wer(SENTENCES, [h.lower() for h in heard]))
    assert 0 < found["wer"] < 0.5
    true = ["sad", "happy", "sad", "angry", "happy"]
    replies = ["The speaker sounds sad.", "sadness", "I cannot tell.", "angry", "happy or sad"]
    scores = library.load(str(MODULES / "label_scores")).compute(predictions=replies, references=true)
    named = ["sad", "sad", "?", "angry", "?"]
    assert scores["accuracy"] == accuracy_score(true, named)
    assert scores["unparsed"] == 0.4
    options = {"labels": ["angry", "happy", "sad"], "zero_division": 0}
    assert scores["unweighted_accuracy"] == pytest.approx(recall_score(true, named, average="macro", **options))
    assert scores["weighted_f1"] == pytest.approx(f1_score(true, named, average="weighted", **options))
