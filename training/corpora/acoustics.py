"""Recording conditions of a clip: a room, background noise, a telephone line and another level."""

import numpy as np
import soxr

SAMPLING_RATE = 16_000
ANY_LEVEL = (1.0, 24.0)  # dB below full scale


def room(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a plausible small room: a direct path, then exponentially decaying noise."""
    decay = rng.uniform(0.1, 0.5)  # seconds to -60 dB
    time = np.arange(int(decay * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay)
    tail *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    size = 1 << (len(audio) + len(tail)).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]


def noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power whose spectrum falls by 0 (white) to 6 dB (brown) an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0.0, 1.0)
    samples = np.fft.irfft(spectrum, length)
    return samples / (np.sqrt(np.mean(samples**2)) + 1e-9)


def degrade(audio: np.ndarray, rng: np.random.Generator, level: tuple[float, float] = ANY_LEVEL) -> np.ndarray:
    """The clip, (samples,) at 16 kHz, with a room, background noise and a telephone line, each by chance.

    The peak level is drawn from `level`, a range in dB below full scale.
    """
    audio = audio / (np.max(np.abs(audio)) + 1e-9)
    if rng.random() < 0.4:
        audio = room(audio, rng)
    if rng.random() < 0.7:
        power = np.sqrt(np.mean(audio**2))
        audio = audio + noise(len(audio), rng) * power * 10 ** (-rng.uniform(8, 40) / 20)
    if rng.random() < 0.1:  # telephone band
        audio = soxr.resample(soxr.resample(audio, SAMPLING_RATE, 8_000), 8_000, SAMPLING_RATE)
    return audio / (np.max(np.abs(audio)) + 1e-9) * 10 ** (-rng.uniform(*level) / 20)
