"""Temperatures of probabilities."""

import numpy as np
import pytest

from dual_slm.training.evaluation.calibrate import fit_temperature


def test_the_temperature_of_overconfident_probabilities_is_found():
    """Labels drawn from known probabilities, told three times too sharply."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 5)) * 1.5
    true = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    labels = np.array([rng.choice(5, p=p) for p in true])
    assert fit_temperature(3 * scores, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(scores, labels) == pytest.approx(1, rel=0.05)
