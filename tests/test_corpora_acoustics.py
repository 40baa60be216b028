"""Recording conditions of a clip."""

import numpy as np

from conftest import tone
from dual_slm.training.corpora.acoustics import degrade


def test_degraded_audio_is_a_function_of_its_seed_and_never_clips():
    for seed in range(12):
        first, again = (degrade(tone(0.5), np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, again)
        assert np.abs(first).max() <= 1
    assert not np.array_equal(first, degrade(tone(0.5), np.random.default_rng(99)))
