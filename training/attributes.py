"""Pitch, energy and tempo of a clip, and their classes by TextrolSpeech's published thresholds or one's own tertiles."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thresholds:
    """Borders of low | normal | high. Defaults: TextrolSpeech's (jishengpeng/TextrolSpeech, dataprocess.py)."""

    pitch: tuple[float, float] = (136.57698522, 196.09780757)  # Hz, mean F0 of voiced frames
    energy: tuple[float, float] = (0.03331899, 0.05054203)  # mean RMS, full scale 1
    tempo: tuple[float, float] = (0.252, 0.38645446)  # seconds a word: below the first is fast, above the second slow


def measure(samples: np.ndarray, sampling_rate: int, transcript: str | None = None) -> dict[str, float | None]:
    """Mean F0 in Hz (pyworld's dio and stonemask), mean RMS (librosa), seconds a word with silence trimmed.

    `None` where there is nothing to measure: no voiced frame, no transcript.
    """
    import librosa
    import pyworld

    wide = samples.astype(np.float64)
    f0, times = pyworld.dio(wide, sampling_rate)
    f0 = pyworld.stonemask(wide, f0, times, sampling_rate)
    voiced = f0[f0 > 0]
    words = len((transcript or "").split())
    trimmed, _ = librosa.effects.trim(samples, top_db=30)
    return {
        "pitch": float(voiced.mean()) if len(voiced) else None,
        "energy": float(librosa.feature.rms(y=samples).mean()),
        "tempo": len(trimmed) / sampling_rate / words if words else None,
    }


def classify(measured: dict[str, float | None], thresholds: Thresholds) -> dict[str, str | None]:
    """low | normal | high for pitch and energy, slow | normal | fast for tempo, `None` where nothing was measured."""
    names = {
        "pitch": ("low", "normal", "high"),
        "energy": ("low", "normal", "high"),
        "tempo": ("fast", "normal", "slow"),
    }
    result = {}
    for name, classes in names.items():
        value = measured.get(name)
        result[name] = (
            None if value is None else classes[int(np.searchsorted(getattr(thresholds, name), value, "right"))]
        )
    return result
