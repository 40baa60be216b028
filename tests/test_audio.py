"""Any audio there is becomes mono samples at the model's rate, or is refused with its value."""

import numpy as np
import pytest
import soundfile
import soxr
import torch

from conftest import tone
from dual_slm.audio_dual_slm import load_audio


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 192_000])
def test_other_rates_are_resampled(rate):
    audio = tone(1.0)
    there = soxr.resample(audio, 16_000, rate)
    back = load_audio(there, rate)
    assert abs(len(back) - 16_000) <= 2
    # The tone lies far below 4 kHz, so it survives the way through any of these rates; the noise above is not compared.
    low = soxr.resample(soxr.resample(audio, 16_000, 6_000), 6_000, 16_000)
    again = soxr.resample(soxr.resample(back, 16_000, 6_000), 6_000, 16_000)
    size = min(len(low), len(again))
    assert np.abs(low[200 : size - 200] - again[200 : size - 200]).max() < 0.02


@pytest.mark.parametrize(
    ("form", "convert"),
    [
        ("int16", lambda a: (a * 32768).astype(np.int16)),
        ("int32", lambda a: (a.astype(np.float64) * 2**31).astype(np.int32)),
        ("uint8", lambda a: np.round(a * 128 + 128).astype(np.uint8)),
        ("float64", lambda a: a.astype(np.float64)),
        ("list", lambda a: a.tolist()),
        ("tensor", torch.from_numpy),
        ("stereo", lambda a: np.stack([a, a], axis=1)),
        ("channels first", lambda a: np.stack([a, a])),
        ("datasets", lambda a: {"array": a, "sampling_rate": 16_000}),
        ("pair", lambda a: (a, 16_000)),
    ],
)
def test_every_form_of_samples_gives_the_same_clip(form, convert):
    audio = tone(0.5)
    np.testing.assert_allclose(load_audio(convert(audio)), audio, atol=0.005 if form == "uint8" else 1e-4)


def test_files_of_every_format(tmp_path):
    audio = tone(0.5)
    for name, options in {"a.wav": {}, "a.flac": {}, "a.ogg": {}, "a.mp3": {}}.items():
        soundfile.write(tmp_path / name, np.stack([audio, audio], 1), 16_000, **options)
        loaded = load_audio(tmp_path / name)
        assert loaded.dtype == np.float32
        assert abs(len(loaded) - len(audio)) < 2_000
        assert 0.5 < np.sqrt((loaded**2).mean()) / np.sqrt((audio**2).mean()) < 1.5


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.array([0.1, np.nan, np.inf], np.float32), "2 of 3 samples are NaN or infinite"),
        (np.array([0.0, 20000.0], np.float32), "peak at 20000"),
        (np.zeros((3, 4, 5), np.float32), "not one clip"),
        (np.zeros((20, 30), np.float32), "neither mono nor"),
        (np.array(["a", "b"]), "are not audio"),
        ((np.zeros(10, np.float32), 10), "10 Hz is out of reason"),
        ({"samples": [0.0]}, "'array' and 'sampling_rate'"),
    ],
)
def test_bad_samples_are_refused_with_their_value(audio, message):
    with pytest.raises(ValueError, match=message):
        load_audio(audio)


def test_files_that_are_not_audio(tmp_path):
    (tmp_path / "notes.wav").write_text("these are notes")
    with pytest.raises(ValueError, match=r"notes\.wav is not audio that libsndfile reads.*ffmpeg"):
        load_audio(str(tmp_path / "notes.wav"))
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        load_audio(str(tmp_path / "missing.wav"))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(ValueError, match=r"empty\.wav: there are no samples"):
        load_audio(str(tmp_path / "empty.wav"))


def test_bytes_and_open_files_are_read_like_the_file(tmp_path):
    """What a web server is sent."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.5), 16_000)
    wanted = load_audio(str(path))
    with open(path, "rb") as file:
        for given in (path.read_bytes(), file):
            np.testing.assert_array_equal(load_audio(given), wanted)
    with pytest.raises(ValueError, match="is not audio that libsndfile reads"):
        load_audio(b"no audio at all")
