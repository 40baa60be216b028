"""Clips without speech."""

import numpy as np
import soundfile

from dual_slm.training.corpora.folder import read_folder
from dual_slm.training.corpora.nonspeech import build_nonspeech
from dual_slm.training.text import normalize, nothing_said


def test_clips_without_speech_repeat_and_say_nothing(tmp_path):
    for name in "ab":
        build_nonspeech(tmp_path / name, 12, seed=5)
    rows = read_folder(tmp_path / "a")
    assert [row.split for row in rows].count("train") == 10 and rows[-1].split == "test"
    for row in rows:
        samples, rate = soundfile.read(row.audio)
        other, _ = soundfile.read(row.audio.replace("/a/", "/b/"))
        assert np.array_equal(samples, other) and rate == 16_000 and 1 <= len(samples) / rate <= 12
        assert normalize(row.transcript) == [] and nothing_said(row.transcript)
    assert not nothing_said("42") and not nothing_said("well (laughs)")
    assert normalize("dated (which also was printed)") == ["dated", "which", "also", "was", "printed"]
