"""Augmented copies of a clip: their audio, and what is said of it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import lfilter

from conftest import tone
from dual_slm.training.attributes import Thresholds, measure
from dual_slm.training.augmentation import augmented, load_clip, other_voice
from dual_slm.training.corpora.row import Row, Variant, make_row


def clip(path: Path, samples: np.ndarray, **known) -> Row:
    soundfile.write(path, samples, 16_000)
    return make_row(id="a", corpus="c", split="train", audio=str(path), **known)


def test_augmented_copies_differ_and_repeat(tmp_path):
    row = clip(tmp_path / "a.wav", tone(0.5))
    first, second = (load_clip(row.replace(variant=Variant(copy))) for copy in (1, 2))
    assert np.array_equal(first, load_clip(row.replace(variant=Variant(1))))
    assert len(first) != len(second)
    np.testing.assert_allclose(load_clip(row), tone(0.5), atol=1e-4)


def test_labels_of_an_augmented_copy_are_what_is_true_of_it():
    """Pitch and tempo follow the speed of the copy, energy is not known any more; words, speaker and emotion stay."""
    row = make_row(
        id="a", corpus="c", split="train", transcript="one two", pitch="normal", tempo="normal", energy="low"
    )
    row = row.replace(gender="male", emotion="sad", pitch_hz=190.0, seconds_per_word=0.26, energy_rms=0.01)
    speeds, tone_hz = set(), 200.0
    for copy in range(1, 9):
        changed = augmented(row, copy, Thresholds())
        speed = changed.pitch_hz / row.pitch_hz
        speeds.add(speed)
        assert changed.seconds_per_word == pytest.approx(0.26 / speed)
        assert changed.pitch == ("high" if 190 * speed > Thresholds().pitch[1] else "normal")
        assert changed.tempo == ("fast" if 0.26 / speed < Thresholds().tempo[0] else "normal")
        assert changed.energy is None and changed.caption is None and changed.energy_rms is None
        assert (changed.emotion, changed.gender, changed.transcript) == ("sad", "male", "one two")
        assert augmented(row, copy).pitch is None  # without borders there is no label
        assert abs(tone_hz * speed - tone_hz) < 0.16 * tone_hz
    assert len(speeds) == 8


def test_a_clip_at_another_loudness_is_the_same_clip(tmp_path):
    row = clip(tmp_path / "a.wav", tone(0.5))
    louder = load_clip(row.replace(variant=Variant(loudness=0.05)))
    assert np.sqrt(np.mean(louder**2)) == pytest.approx(0.05, rel=1e-3)
    np.testing.assert_allclose(louder / np.abs(louder).max(), load_clip(row) / np.abs(load_clip(row)).max(), atol=1e-5)


def test_the_speed_of_a_copy_is_that_of_its_audio(tmp_path):
    """A tone's frequency in the augmented audio says by how much it was sped up."""
    time = np.arange(32_000) / 16_000
    row = clip(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time).astype(np.float32), pitch_hz=440.0)
    for copy in (1, 2, 3):
        samples = load_clip(augmented(row, copy))
        spectrum = np.abs(np.fft.rfft(samples))
        heard = 16_000 * int(spectrum[len(samples) // 100 :].argmax() + len(samples) // 100) / len(samples)
        assert heard == pytest.approx(augmented(row, copy).pitch_hz, rel=0.01)


def test_a_copy_in_another_voice_has_the_pitch_the_formants_and_the_tempo_that_it_says(tmp_path):
    """A vowel of one formant: its pitch is measured, its formant is where the spectrum is strongest."""
    rate, pulses = 16_000, np.zeros(32_000, np.float32)
    pulses[:: rate // 125] = 1.0  # a voice of 125 Hz
    formant = lfilter([1.0], [1.0, -2 * 0.98 * np.cos(2 * np.pi * 1_000 / rate), 0.98**2], pulses)
    vowel = (0.1 * formant / np.abs(formant).max()).astype(np.float32)
    for formants, pitch, tempo in ((1.2, 1.0, 1.0), (1.0, 1.3, 1.0), (1.0, 1.0, 0.9), (0.85, 1.2, 1.1)):
        voice = other_voice(vowel, rate, formants, pitch, tempo)
        assert len(voice) == pytest.approx(len(vowel) / tempo, rel=0.01)
        assert measure(voice, rate)["pitch"] == pytest.approx(125 * pitch, rel=0.03)
        power = np.abs(np.fft.rfft(voice[4_000:-4_000])) ** 2
        frequencies = np.fft.rfftfreq(len(voice) - 8_000, 1 / rate)
        near = np.abs(frequencies - 1_000 * formants) < 1.5 * 125 * pitch  # a harmonic stands there
        assert near[power.argmax()]
    row = clip(tmp_path / "a.wav", vowel, gender="male", emotion="sad", pitch_hz=125.0, seconds_per_word=0.3)
    copies = [augmented(row, n, Thresholds(), revoice=True) for n in range(1, 5)]
    assert len({copy.pitch_hz for copy in copies}) == 4
    for copy in copies:
        assert (copy.gender, copy.emotion, copy.energy) == (None, "sad", None)
        assert len(load_clip(copy)) == pytest.approx(32_000 * copy.seconds_per_word / 0.3, rel=0.01)
    assert not np.array_equal(load_clip(copies[0]), load_clip(augmented(row, 1)))
    silence = other_voice(np.zeros(3_200, np.float32), rate, 1.1, 0.9, 1.0)  # no voice to change
    assert np.isfinite(silence).all() and np.abs(silence).max() < 1e-3
