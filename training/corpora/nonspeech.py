"""Synthesises clips without speech: silence, noise, mains hum, tones, knocks and music."""

from pathlib import Path

import numpy as np
import soundfile

from .acoustics import SAMPLING_RATE, degrade, noise
from .folder import write_metadata

NO_SPEECH = "(no speech)"  # the transcript of such a clip; parentheses mean that nothing is said
_SOUNDS = ("silence", "noise", "hum", "tones", "knocks", "music")


def _decay(length: int, seconds: float) -> np.ndarray:
    return np.exp(-np.arange(length) / (SAMPLING_RATE * seconds))


def _note(frequency: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """A tone with overtones that decay, struck or swelling."""
    time = np.arange(length) / SAMPLING_RATE
    overtones = np.arange(1, 1 + int(min(8, 7_000 // frequency)))
    weights = overtones ** -rng.uniform(0.8, 2.5)
    vibrato = 1 + rng.uniform(0, 0.004) * np.sin(2 * np.pi * rng.uniform(4, 7) * time)
    wave = (weights[:, None] * np.sin(2 * np.pi * frequency * overtones[:, None] * time * vibrato)).sum(0)
    rise = np.minimum(1.0, time / rng.uniform(0.005, 0.15))
    return wave * rise * _decay(length, rng.uniform(0.15, 1.5))


def _music(length: int, rng: np.random.Generator) -> np.ndarray:
    """Chords, a melody over them and, by chance, a beat."""
    audio = np.zeros(length)
    beat = int(SAMPLING_RATE * 60 / rng.uniform(70, 170))
    root = rng.uniform(80, 220)
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.5 else [0, 2, 3, 5, 7, 8, 10])
    drums = rng.random() < 0.6
    for number, start in enumerate(range(0, length, beat)):
        if number % 4 == 0:
            degree = int(rng.integers(7))
            for step in (0, 2, 4):
                tone = root * 2 ** ((scale[(degree + step) % 7] + 12 * ((degree + step) // 7)) / 12)
                note = _note(tone, min(4 * beat, length - start), rng)
                audio[start : start + len(note)] += note
        if rng.random() < 0.7:
            note = _note(root * 2 ** (1 + scale[rng.integers(7)] / 12), min(beat, length - start), rng)
            audio[start : start + len(note)] += 0.8 * note
        if drums:
            size = min(beat, length - start)
            audio[start : start + size] += rng.uniform(0.3, 1.2) * rng.standard_normal(size) * _decay(size, 0.03)
    return audio


def make_nonspeech(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A clip of 1 to 12 s of one of `_SOUNDS`: (samples,) float32 at 16 kHz."""
    length = int(SAMPLING_RATE * rng.uniform(1, 12))
    time = np.arange(length) / SAMPLING_RATE
    if kind == "silence":
        return (rng.standard_normal(length) * 10 ** (-rng.uniform(60, 110) / 20)).astype(np.float32)
    if kind == "noise":
        audio = noise(length, rng) * (1 + rng.uniform(0, 0.9) * np.sin(2 * np.pi * rng.uniform(0.1, 8) * time))
    elif kind == "hum":
        mains = rng.choice((50, 60))
        audio = sum(np.sin(2 * np.pi * mains * n * time) / n for n in range(1, 7))
        audio = audio + rng.uniform(0, 0.5) * noise(length, rng)
    elif kind == "tones":
        audio = np.zeros(length)
        for start in range(0, length, int(SAMPLING_RATE * rng.uniform(0.2, 2))):
            size = min(int(SAMPLING_RATE * rng.uniform(0.1, 2)), length - start)
            frequency = rng.uniform(150, 3_000) * np.exp(rng.uniform(-0.5, 0.5) * np.arange(size) / size)
            audio[start : start + size] += np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)
    elif kind == "knocks":
        audio = 0.003 * noise(length, rng)
        for start in rng.integers(0, length, int(rng.integers(1, 25))):
            size = min(int(SAMPLING_RATE * 0.4), length - int(start))
            knock = noise(size, rng) + 2 * np.sin(2 * np.pi * rng.uniform(80, 2_500) * time[:size])
            audio[start : start + size] += knock * _decay(size, rng.uniform(0.005, 0.1)) * rng.uniform(0.2, 1)
    else:
        audio = _music(length, rng)
    return degrade(audio, rng, (1, 40)).astype(np.float32)


def build_nonspeech(output: str | Path, clips: int, seed: int = 0) -> Path:
    """Writes a folder of clips and returns its metadata file. The ninth tenth is validation, the last one is test."""
    output, records = Path(output), []
    (output / "audio").mkdir(parents=True, exist_ok=True)
    for index in range(clips):
        audio = make_nonspeech(_SOUNDS[index % len(_SOUNDS)], np.random.default_rng([seed, index, 2]))
        name = f"audio/{index:06d}.flac"
        soundfile.write(output / name, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        split = "train" if index < 0.8 * clips else "validation" if index < 0.9 * clips else "test"
        known = {"id": f"nonspeech/{seed}/{index:06d}", "file": name, "corpus": "nonspeech", "split": split}
        records.append(known | {"transcript": NO_SPEECH, "duration": round(len(audio) / SAMPLING_RATE, 3)})
    return write_metadata(records, output)
