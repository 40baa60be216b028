"""Clips as training hears them: as recorded, or as augmented copies at another speed or in another voice."""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import soxr

from ..audio_dual_slm import load_audio
from .attributes import Thresholds, classify, load_pyworld, pitch_track
from .corpora.acoustics import degrade
from .corpora.row import Row
from .labels import MEASURED


class _Change(NamedTuple):
    formants: float  # factors; > 1: higher, faster
    pitch: float
    tempo: float


def load_clip(row: Row, sampling_rate: int = 16_000) -> np.ndarray:
    """Samples of a row's clip in its variant, (samples,) float32.

    An augmented copy has another speed or voice, a room, noise, a telephone line and another level.
    """
    samples, variant = load_audio(row.audio, target_rate=sampling_rate), row.variant
    if variant.loudness is not None:
        samples = samples * np.float32(variant.loudness / max(float(np.sqrt(np.mean(samples**2))), 1e-6))
    if variant.copy is None:
        return samples
    change, rng = _draw_change(row.id, variant.copy, variant.revoiced)
    if variant.revoiced:
        samples = other_voice(samples, sampling_rate, *change)
    else:
        samples = soxr.resample(samples, sampling_rate * change.tempo, sampling_rate)
    return degrade(samples, rng).astype(np.float32)


def _draw_change(row_id: str, copy: int, revoice: bool) -> tuple[_Change, np.random.Generator]:
    """The change of an augmented copy, and the generator for its recording conditions."""
    rng = np.random.default_rng([copy, *hashlib.sha256(row_id.encode()).digest()[:8]])
    if revoice:
        return _Change(*(float(np.exp(rng.uniform(-most, most))) for most in (0.18, 0.35, 0.12))), rng
    speed = float(np.exp(rng.uniform(-0.14, 0.14)))
    return _Change(speed, speed, speed), rng


def other_voice(samples: np.ndarray, sampling_rate: int, formants: float, pitch: float, tempo: float) -> np.ndarray:
    """The clip in another voice by WORLD (pyworld), with the manner of speaking kept: (samples / tempo,) float64.

    Factors above 1 make formants and pitch higher, and the tempo faster.
    """
    pyworld = load_pyworld()
    samples = samples.astype(np.float64)
    f0, times = pitch_track(samples, sampling_rate)
    envelope = np.log(pyworld.cheaptrick(samples, f0, times, sampling_rate))
    aperiodicity = pyworld.d4c(samples, f0, times, sampling_rate)
    bins = np.arange(envelope.shape[1])  # a formant at a frequency moves to `formants` times it
    stretched = ([np.interp(bins / formants, bins, frame) for frame in each] for each in (envelope, aperiodicity))
    envelope, aperiodicity = map(np.array, stretched)
    period = pyworld.default_frame_period / tempo
    return pyworld.synthesize(f0 * pitch, np.exp(envelope), aperiodicity, sampling_rate, period)


def augmented(row: Row, copy: int, thresholds: Thresholds | None = None, revoice: bool = False) -> Row:
    """The row of an augmented copy: at another speed, or `revoice`d. The number of the copy is the seed of its draws.

    Words and emotion stay. Pitch and tempo are changed where they were measured, and labelled by `thresholds`. Energy and
    caption become None, and so does the gender in another voice.
    """
    change, _ = _draw_change(row.id, copy, revoice)
    known = {"pitch": row.pitch_hz and row.pitch_hz * change.pitch}
    known |= {"tempo": row.seconds_per_word and row.seconds_per_word / change.tempo}
    labels = dict.fromkeys(MEASURED) if thresholds is None else classify(known, thresholds)
    measured = {column: known.get(name) for name, column in MEASURED.items()}
    gender = None if revoice else row.gender
    variant = replace(row.variant, copy=copy, revoiced=revoice)
    return row.replace(**labels, **measured, gender=gender, caption=None, variant=variant)
