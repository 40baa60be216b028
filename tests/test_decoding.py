"""Odd audio: every form of it that people have gives the clip, at its level and length, or is refused with the reason.

The clip is compared by length, level and correlation, whatever the codec. Files are made here; those of ffmpeg are skipped
where it is not installed.
"""

import array
import base64
import io
import json
import logging
import mmap
import os
import shutil
import struct
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from conftest import tone
from dual_slm import audio_dual_slm, decoding_dual_slm
from dual_slm.audio_dual_slm import load_audio
from dual_slm.training.corpora.checks import Report, check_rows
from dual_slm.training.corpora.folder import read
from dual_slm.training.files import DEMO_CLIP

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
SECONDS = 2.0
CLIP = tone(SECONDS)


def encode(samples: np.ndarray = CLIP, rate: int = 16_000, **options) -> bytes:
    buffer = io.BytesIO()
    keywords: dict[str, Any] = {"format": "WAV"} | options
    soundfile.write(buffer, samples, rate, **keywords)
    return buffer.getvalue()


def ffmpeg(*options: str, suffix: str, folder: Path, picture: bool = False) -> bytes:
    (folder / "in.wav").write_bytes(encode())
    video = ["-f", "lavfi", "-i", "color=black:s=64x64:d=1"] if picture else []
    command = [str(FFMPEG), "-v", "error", "-y", *video, "-i", str(folder / "in.wav"), *options]
    subprocess.run([*command, str(folder / f"out.{suffix}")], check=True)
    return (folder / f"out.{suffix}").read_bytes()


def compare(found: np.ndarray, source: np.ndarray = CLIP) -> tuple[float, float]:
    """(correlation at the best shift, level in dB) of what was read against the source, both up to 3 kHz."""
    assert found.dtype == np.float32
    assert found.ndim == 1
    low, wanted = (soxr.resample(soxr.resample(x, 16_000, 6_000), 6_000, 16_000) for x in (found, source))
    size = 2 ** int(np.ceil(np.log2(len(low) + len(wanted))))
    shifts = np.fft.irfft(np.fft.rfft(low, size) * np.conj(np.fft.rfft(wanted, size)))
    norms = np.linalg.norm(low), np.linalg.norm(wanted)
    return float(shifts.max() / (norms[0] * norms[1])), float(20 * np.log10(norms[0] / norms[1]))


def check_clip(
    found: np.ndarray, correlation: float = 0.999, slack: float = 0.02, level: float = 0.3, source: np.ndarray = CLIP
) -> None:
    assert abs(len(found) / 16_000 - SECONDS) <= slack
    likeness, difference = compare(found, source)
    assert likeness >= correlation
    assert abs(difference) <= level


# ---- files that libsndfile reads

FORMATS = [
    *(("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM")),
    *(("WAV", s) for s in ("MS_ADPCM", "GSM610", "G721_32")),
    *(("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "FLOAT"), ("NIST", "PCM_16"), ("VOC", "PCM_16")),
    *(("AIFF", s) for s in ("PCM_S8", "PCM_16", "FLOAT", "IMA_ADPCM")),
    *(("AU", s) for s in ("PCM_16", "ULAW", "FLOAT")),
    *(("CAF", s) for s in ("PCM_16", "ALAC_16", "ALAC_24")),
    *(("FLAC", s) for s in ("PCM_S8", "PCM_16", "PCM_24")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("IRCAM", "FLOAT"), ("PAF", "PCM_16")),
    *(
        ("SVX", "PCM_16"),
        ("AVR", "PCM_16"),
        ("MAT4", "FLOAT"),
        ("MAT5", "FLOAT"),
        ("HTK", "PCM_16"),
        ("PVF", "PCM_16"),
    ),
    *(("SDS", "PCM_16"), ("MPC2K", "PCM_16")),
]


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_each_format_of_libsndfile(tmp_path, kind, subtype):
    path = tmp_path / "clip"
    path.write_bytes(encode(format=kind, subtype=subtype))
    noisy = subtype in (
        "PCM_U8",
        "PCM_S8",
        "GSM610",
        "IMA_ADPCM",
        "MS_ADPCM",
        "G721_32",
        "MPEG_LAYER_III",
        "VORBIS",
        "OPUS",
    )
    check_clip(load_audio(path), 0.98 if noisy else 0.999, slack=0.1 if noisy else 0.02, level=1.0 if noisy else 0.3)


# ---- the forms in which encoded bytes come


class _Pipe(io.RawIOBase):
    def __init__(self, data: bytes):
        self.inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self.inner.readinto(buffer)


def at_end(data: bytes) -> io.BytesIO:
    file = io.BytesIO()
    file.write(data)
    return file


class _Upload:
    """As FastAPI's, whose own methods are coroutines."""

    def __init__(self, data: bytes):
        self.file = at_end(data)

    async def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


def mapped(data: bytes) -> mmap.mmap:
    pages = mmap.mmap(-1, len(data))
    pages.write(data)
    return pages


FORMS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "part of a memoryview": lambda data: memoryview(b"xx" + data)[2:],
    "mmap": mapped,
    "array of unsigned bytes": lambda data: array.array("B", data),
    "numpy bytes": lambda data: np.frombuffer(data, np.uint8),
    "numpy signed bytes": lambda data: np.frombuffer(data, np.int8),
    "tensor of bytes": lambda data: torch.frombuffer(bytearray(data), dtype=torch.uint8),
    "list of bytes as an array": lambda data: np.array(list(data), np.uint8),
    "open file": io.BytesIO,
    "open file at its end": at_end,
    "buffered reader": lambda data: io.BufferedReader(_Pipe(data)),
    "pipe": _Pipe,
    "upload": _Upload,
    "datasets, bytes": lambda data: {"bytes": data, "path": None},
    "datasets, bytes and a name": lambda data: {"bytes": data, "path": "clip.flac"},
    "data URI": lambda data: "data:audio/flac;base64," + base64.b64encode(data).decode(),
    "data URI without base64": lambda data: "data:audio/flac," + urllib.parse.quote(data),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_encoded_bytes_in_any_form(form, kind):
    check_clip(load_audio(FORMS[form](encode(format=kind))), 0.99, slack=0.1)


def test_names_of_files(tmp_path):
    path = tmp_path / "a b.raw"  # for soundfile alone, samples without a header
    path.write_bytes(encode(format="FLAC"))
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        for given in (path, str(path), path.as_uri(), {"bytes": None, "path": str(path)}, {"path": str(path)}, file):
            check_clip(load_audio(given))
        assert not file.closed


# ---- samples of every kind


def whole(bits: int, dtype: type = np.int64) -> np.ndarray:
    return (CLIP.astype(np.float64) * (2 ** (bits - 1) - 1)).astype(dtype)


AudioSamples = SimpleNamespace(data=torch.from_numpy(CLIP)[None], sample_rate=16_000)
SAMPLES = {
    "16-bit list": lambda: whole(16).tolist(),
    "24-bit list": lambda: whole(24).tolist(),
    "32-bit list": lambda: whole(32).tolist(),
    "16 bits in int32": lambda: whole(16, np.int32),
    "24 bits in int32": lambda: whole(24, np.int32),
    "16 bits in int32, to the left": lambda: whole(16, np.int32) << 16,
    "16-bit tensor": lambda: torch.from_numpy(whole(16, np.int16)),
    "16-bit long tensor": lambda: torch.from_numpy(whole(16)),
    "unsigned 8": lambda: (whole(8) + 2**7).astype(np.uint8),
    "unsigned 16": lambda: (whole(16) + 2**15).astype(np.uint16),
    "unsigned 32": lambda: (whole(32) + 2**31).astype(np.uint32),
    "array module": lambda: array.array("h", whole(16, np.int16).tobytes()),
    "big endian": lambda: whole(16, np.int16).astype(">i2"),
    "bfloat16": lambda: torch.from_numpy(CLIP).bfloat16(),
    "half": lambda: torch.from_numpy(CLIP).half(),
    "with gradient": lambda: torch.from_numpy(CLIP).requires_grad_(),
    "float16": lambda: CLIP.astype(np.float16),
    "long double": lambda: CLIP.astype(np.longdouble),
    "every second sample of a view": lambda: np.repeat(CLIP, 2)[::2],
    "fortran order": lambda: np.asfortranarray(np.stack([CLIP, CLIP], 1)),
    "one channel first": lambda: CLIP[None],
    "gradio": lambda: (48_000, np.round(soxr.resample(CLIP, 16_000, 48_000) * 32_767).astype(np.int16)),
    "gradio, stereo": lambda: (16_000, np.stack([whole(16, np.int16)] * 2, 1)),
    "gradio as JSON": lambda: [16_000, whole(16).tolist()],
    "numpy rate": lambda: (np.int64(16_000), CLIP),
    "torchaudio": lambda: (torch.from_numpy(CLIP)[None], 16_000),
    "no rate": lambda: (CLIP, None),
    "pipeline": lambda: {"raw": soxr.resample(CLIP, 16_000, 8_000), "sampling_rate": 8_000},
    "datasets, old": lambda: {"array": CLIP, "path": "clip.wav", "sampling_rate": 16_000, "bytes": None},
    "datasets, AudioDecoder": lambda: SimpleNamespace(get_all_samples=lambda: AudioSamples, metadata=None),
    "torchcodec": lambda: AudioSamples,
}


@pytest.mark.parametrize("form", SAMPLES)
def test_samples_of_every_kind(form):
    check_clip(load_audio(SAMPLES[form]()), 0.99 if form == "unsigned 8" else 0.999)


def test_silence_has_no_scale_and_stays_silence():
    for silence in ([0] * 1_000, np.zeros(1_000, np.int32), np.full(1_000, 2**15, np.uint16)):
        np.testing.assert_array_equal(load_audio(silence), np.zeros(1_000, np.float32))


# ---- channels

SPEECH = soundfile.read(DEMO_CLIP, int(SECONDS * 16_000), start=8_000, dtype="float32")[0]


def rumble(level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 30 * np.arange(len(SPEECH)) / 16_000)).astype(np.float32)


def noise(level: float, seed: int = 5) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(len(SPEECH))).astype(np.float32)


NOTHING, HALF = np.zeros_like(SPEECH), len(SPEECH) // 2
FIRST, SECOND = (
    np.where((np.arange(len(SPEECH)) < HALF) == first, SPEECH, 0).astype(np.float32) for first in (True, False)
)
CHANNELS = {
    "two alike": [SPEECH, SPEECH],
    "right is dead": [SPEECH, NOTHING],
    "left is dead": [NOTHING, SPEECH],
    "right is hiss": [SPEECH, noise(0.003)],
    "right is an offset": [SPEECH, np.full_like(SPEECH, 0.5)],
    "right is rumble": [SPEECH, rumble(0.2)],
    "right is quiet": [SPEECH, SPEECH / 2],
    "right is quiet and turned over": [SPEECH, -SPEECH / 20],
    "a call, each speaker on one side": [FIRST, SECOND],
    "a call with crosstalk": [FIRST + SECOND / 50, SECOND + FIRST / 50],
    "5.1, the centre alone": [NOTHING, NOTHING, SPEECH, NOTHING, NOTHING, NOTHING],
    "5.1 with rumble": [NOTHING, NOTHING, SPEECH, rumble(0.3), NOTHING, NOTHING],
    "5.1 with a room": [noise(0.01, 1), noise(0.01, 2), SPEECH, NOTHING, noise(0.01, 3), noise(0.01, 4)],
    "four microphones, one alive": [NOTHING, noise(1e-4), SPEECH, NOTHING],
    "seven alike of eight": [*[SPEECH] * 7, NOTHING],
}


@pytest.mark.parametrize("form", CHANNELS)
def test_channels_cost_no_level(form):
    stacked = np.stack(CHANNELS[form], 1)
    noisy = any(word in form for word in ("room", "crosstalk", "hiss"))
    found = load_audio(stacked)
    check_clip(found, 0.98 if noisy else 0.999, level=0.5, source=SPEECH)
    np.testing.assert_allclose(load_audio(encode(stacked, subtype="FLOAT")), found, atol=1e-6)


def test_ordinary_stereo_is_the_mean_of_its_channels():
    left, right = SPEECH + noise(0.02, 1), SPEECH + noise(0.02, 2)
    np.testing.assert_array_equal(load_audio(np.stack([left, right], 1)), np.stack([left, right], 1).mean(1))


@pytest.mark.parametrize(
    "channels", [[SPEECH, -SPEECH], [SPEECH, -0.8 * SPEECH + noise(0.02)], [NOTHING, SPEECH, -SPEECH]]
)
def test_channels_that_cancel_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels \d and \d cancel \(opposite phase\)"):
        load_audio(np.stack(channels, 1))


def test_a_long_stereo_file_is_decoded_twice_and_a_short_one_once(monkeypatch):
    """With the same result."""
    stereo = np.stack([SPEECH, NOTHING], 1)
    data, once = encode(stereo), load_audio(stereo)
    monkeypatch.setattr(audio_dual_slm, "_HELD_BLOCKS", 1)
    monkeypatch.setattr(decoding_dual_slm, "BLOCK_VALUES", 2**14)
    np.testing.assert_allclose(load_audio(data), once, atol=1e-4)


# ---- headers that lie


def data_size(wav: bytes, size: int) -> bytes:
    place = wav.index(b"data") + 4
    return wav[:place] + struct.pack("<I", size) + wav[place + 4 :]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


# Seconds that are to be read at least, and what the warning says.
LIES = {
    "WAV of a crashed recorder": (lambda: data_size(encode(), 0), 2.0, "its header says 0 s"),
    "WAV of a crashed recorder, floats": (lambda: data_size(encode(subtype="FLOAT"), 0), 2.0, "its header says 0 s"),
    "WAV, upload cut short": (lambda: cut(encode(), 0.5), 0.99, "1.0 s are missing"),
    "WAV, a size too large": (lambda: data_size(encode(), 96_000), 2.0, "1.0 s are missing"),
    "WAV of a pipe": (lambda: data_size(encode(), 2**32 - 1), 2.0, ""),
    "WAV of sox's pipe": (lambda: data_size(encode(), 0x7FFFF000), 2.0, ""),
    "AIFF, cut": (lambda: cut(encode(format="AIFF"), 0.75), 1.49, "0.5 s are missing"),
    "FLAC, cut": (lambda: cut(encode(format="FLAC"), 0.5), 0.5, "s are missing"),
    "MP3, cut": (lambda: cut(encode(format="MP3"), 0.5), 0.8, "s are missing"),
    "Ogg, cut": (lambda: cut(encode(np.tile(CLIP, 4), format="OGG"), 0.5), 1.0, "its last page is missing"),
    "whole WAV": (encode, 2.0, ""),
    "whole Ogg": (lambda: encode(format="OGG"), 2.0, ""),
    "whole MP3": (lambda: encode(format="MP3"), 2.0, ""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_is_cut_short_is_read_as_far_as_it_goes_and_told(lie, caplog):
    make, seconds, message = LIES[lie]
    with caplog.at_level(logging.WARNING):
        found = load_audio(make())
    assert len(found) >= seconds * 16_000
    size = min(len(found), len(CLIP))
    assert compare(found[:size], CLIP[:size])[0] > 0.99
    assert message in caplog.text
    assert ("cut short" in caplog.text) == bool(message)


# ---- what ffmpeg reads

MADE = {
    "browser": ("webm", "-c:a libopus -f webm -live 1"),
    "webm, opus": ("webm", "-c:a libopus"),
    "webm, vorbis": ("webm", "-c:a libvorbis"),
    "matroska, flac": ("mkv", "-c:a flac"),
    "phone": ("m4a", "-c:a aac"),
    "index in front": ("m4a", "-c:a aac -movflags +faststart"),
    "fragments": ("mp4", "-c:a aac -movflags frag_keyframe+empty_moov"),
    "alac": ("m4a", "-c:a alac"),
    "aac": ("aac", "-c:a aac"),
    "3gp": ("3gp", "-c:a aac"),
    "quicktime": ("mov", "-c:a pcm_s16le"),
    "wma": ("wma", "-c:a wmav2"),
    "wma, first version": ("wma", "-c:a wmav1"),
    "ac3": ("ac3", "-c:a ac3 -ar 48000"),
    "wavpack": ("wv", "-c:a wavpack"),
    "true audio": ("tta", "-c:a tta"),
    "flash": ("flv", "-c:a aac -ar 44100"),
    "transport stream": ("ts", "-c:a aac"),
    "avi": ("avi", "-c:a pcm_s16le"),
    "wav with mp3 in it": ("wav", "-c:a libmp3lame"),
}


@needs_ffmpeg
@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_containers_of_phones_and_browsers(tmp_path, name, by_path):
    suffix, options = MADE[name]
    data = ffmpeg(*options.split(), suffix=suffix, folder=tmp_path)
    check_clip(load_audio(tmp_path / f"out.{suffix}" if by_path else data), 0.98, slack=0.15, level=1.0)


@needs_ffmpeg
def test_a_video_gives_its_sound_though_its_picture_is_shorter_or_longer(tmp_path, caplog):
    data = ffmpeg("-c:a", "aac", suffix="mp4", folder=tmp_path, picture=True)
    check_clip(load_audio(data), 0.98, slack=0.15, level=1.0)
    silent = subprocess.run(
        [str(FFMPEG), "-v", "error", "-f", "lavfi", "-i", "color=black:s=64x64:d=1", "-f", "matroska", "-"],
        capture_output=True,
        check=True,
    ).stdout
    with pytest.raises(ValueError, match=r"nor ffmpeg \(.*matches no streams"):
        load_audio(silent)
    assert "cut short" not in caplog.text


@needs_ffmpeg
@pytest.mark.parametrize(("suffix", "codec"), [("webm", "libopus"), ("mkv", "flac")])
def test_a_cut_container_is_read_as_far_as_it_goes(tmp_path, caplog, suffix, codec):
    data = cut(ffmpeg("-c:a", codec, suffix=suffix, folder=tmp_path), 0.6)
    with caplog.at_level(logging.WARNING):
        found = load_audio(data)
    assert 0.5 * 16_000 < len(found) < 1.8 * 16_000
    assert compare(found, CLIP[: len(found)])[0] > 0.9
    assert "cut short" in caplog.text


@needs_ffmpeg
def test_what_a_file_names_is_not_read_by_ffmpeg(tmp_path):
    """Playlists would make a server read its own files, or ask hosts of its network."""
    (tmp_path / "secret.m4a").write_bytes(ffmpeg("-c:a", "aac", suffix="m4a", folder=tmp_path))
    secret = tmp_path / "secret.m4a"
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
    for text in (
        f"ffconcat version 1.0\nfile '{secret}'\n",
        playlist.format(secret),
        playlist.format("http://127.0.0.1:9/x"),
    ):
        with pytest.raises(ValueError, match="is not audio that libsndfile reads"):
            load_audio(text.encode())


@needs_ffmpeg
def test_ffmpeg_has_limits(tmp_path, monkeypatch):
    data = ffmpeg("-c:a", "libopus", suffix="webm", folder=tmp_path)
    with pytest.raises(ValueError, match=r"lasts 2 s or more .*; at most 1 s"):
        load_audio(data, max_seconds=1.0)
    monkeypatch.setattr(decoding_dual_slm, "MAX_BYTES", 1_000)
    with pytest.raises(ValueError, match=r"bytes; ffmpeg gets 1,000 at most"):
        load_audio(data)
    monkeypatch.undo()
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(decoding_dual_slm, "FFMPEG_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"ffmpeg was stopped after 0\.2 s"):
        load_audio(data)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x1a\x45\xdf\xa3" + bytes(60), "WebM or Matroska"),
        (b"\0\0\0\x20ftypM4A " + bytes(60), "MP4 or M4A"),
        (b"#!AMR\n" + bytes(60), "AMR"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(60), "WMA or ASF"),
        (b"just some text" * 9, "Any other format"),
    ],
)
def test_without_ffmpeg_its_absence_is_said(tmp_path, monkeypatch, head, kind):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clip.x").write_bytes(head)
    with pytest.raises(
        ValueError, match=rf"clip\.x is not .*{kind} needs ffmpeg, which is missing on the PATH: `apt-get"
    ):
        load_audio(tmp_path / "clip.x")


# ---- refusals


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "the microphone recorded nothing"),
        (b"", r"audio is empty \(0 bytes\)"),
        (io.BytesIO(), r"is empty \(0 bytes\)"),
        ({"bytes": b"", "path": "a.wav"}, r"a\.wav is empty"),
        ({"bytes": None, "path": None}, r"the keys \['bytes', 'path'\] with no value"),
        ({"array": None, "sampling_rate": 16_000}, r"with values of \['sampling_rate'\]"),
        (io.StringIO("text"), "gives str, not bytes: open it in binary mode"),
        ("", "neither a path nor a URL: name a file"),
        (base64.b64encode(encode()).decode(), "base64 needs `data:audio/wav;base64,` in front"),
        ("data:audio/wav;base64,@@@", "is no valid data URI"),
        ("data:audio/wav", "is no valid data URI"),
        ("/dev/zero", "is a pipe or a device"),
        ([[0.1, 0.2], [0.3]], "have different lengths"),
        (np.array([1, 100, -3]), r"int64 samples peak at 100, which tells no scale"),
        (np.array([2**40, 0]), "peak at 1,099,511,627,776"),
        (np.abs(whole(16)).astype(np.uint16), "do not lie around 32,768"),
        (whole(16, np.int16).view(np.uint16)[CLIP > 0], "do not lie around 32,768"),
        (np.array([1, 2], np.uint64), "uint64 samples"),
        (np.ones(9, bool), "type bool"),
        (np.ones(9, complex), "type complex128"),
        ((CLIP, "fast"), "have different lengths"),
        ({"array": CLIP, "sampling_rate": "fast"}, "a sampling rate of 'fast' is no number"),
        ((CLIP, float("nan")), "nan is no number of Hz"),
        (encode(np.zeros((100, 9))), "has 9 channels, at most 8"),
        (np.zeros((3_601 * 1_000,), np.float32), "lasts 3,601 s; at most 3,600 s"),
    ],
)
def test_refusals_name_value_cause_and_cure(audio, message):
    with pytest.raises(ValueError, match=message):
        load_audio(audio, sampling_rate=1_000) if isinstance(audio, np.ndarray) else load_audio(audio)


# ---- limits


def test_a_long_file_is_refused_by_its_header_and_while_it_is_decoded():
    data = encode(np.zeros(200 * 8_000, np.float32), 8_000, format="FLAC")
    assert len(data) < 50_000
    with pytest.raises(ValueError, match=r"lasts 200 s by its header .* at most 100 s"):
        load_audio(data, max_seconds=100)
    unknown = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]  # STREAMINFO's number of samples: not known
    with pytest.raises(ValueError, match=r"lasts 1\d\d s or more"):
        load_audio(unknown, max_seconds=100)
    with pytest.raises(ValueError, match=r"lasts 200 s; at most 100 s"):
        load_audio((np.zeros(200 * 1_000), 1_000), max_seconds=100)


_PEAK = """
import resource, sys
from dual_slm.audio_dual_slm import load_audio
load_audio(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples = load_audio(sys.argv[2])
print(len(samples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_an_hour_takes_little_more_memory_than_a_minute(tmp_path):
    for name, minutes in (("minute", 1), ("hour", 60)):
        with soundfile.SoundFile(tmp_path / f"{name}.flac", "w", 24_000, 2) as file:
            for _ in range(minutes):
                file.write(np.repeat(tone(90.0)[: 60 * 24_000, None], 2, 1))
    command = [sys.executable, "-c", _PEAK, tmp_path / "minute.flac", tmp_path / "hour.flac"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, kilobytes = map(int, done.stdout.split())
    assert samples == 3_600 * 16_000
    assert kilobytes < 150 * 1024


def test_samples_in_a_temporary_file_are_those_in_memory(monkeypatch):
    audio = np.tile(CLIP, 3)
    monkeypatch.setattr(audio_dual_slm, "SPOOL_SECONDS", 1)
    found = load_audio(encode(audio, subtype="FLOAT"))
    np.testing.assert_array_equal(found, audio)
    audio_dual_slm._drop_pages(found)
    np.testing.assert_array_equal(found, audio)
    found[0] = 0.5  # as any array
    assert found[0] == 0.5


# ---- corpora


def test_a_corpus_counts_each_kind_of_fault_and_reads_what_the_model_reads(tmp_path, monkeypatch):
    makers = {"good.wav": encode(), "crashed.wav": data_size(encode(), 0), "clip.raw": encode(format="FLAC")}
    makers |= {"empty.wav": b"", "phone.m4a": b"\0\0\0\x20ftypM4A " + bytes(60), "notes.wav": b"these are notes" * 9}
    for name, data in makers.items():
        (tmp_path / name).write_bytes(data)
    lines = [json.dumps({"file": name, "text": "words"}) for name in makers]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("PATH", str(tmp_path))
    report = Report()
    rows = list(check_rows(read(tmp_path, report), report))
    assert [Path(row.audio or "").name for row in rows] == ["good.wav", "crashed.wav", "clip.raw"]
    assert [row.duration for row in rows] == [2.0, 2.0, 2.0]
    kinds = {kind.partition(" audio")[0]: Path(report.first[kind]).name for kind in report}
    assert kinds == {"empty": "empty.wav", "no ffmpeg for": "phone.m4a", "damaged": "notes.wav"}


@needs_ffmpeg
def test_a_corpus_of_phones_and_browsers_is_read(tmp_path):
    names = {"a.webm": "libopus", "b.m4a": "aac", "c.mp4": "aac", "d.wma": "wmav2"}
    for name, codec in names.items():
        (tmp_path / name).write_bytes(ffmpeg("-c:a", codec, suffix=name[2:], folder=tmp_path))
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file": name, "text": "words"}) for name in names))
    for folder in (None, tmp_path / "sound"):  # videos as they are, and as FLAC
        report = Report()
        rows = list(check_rows(read(tmp_path, report), report, audio_folder=folder))
        assert not report
        for row in rows:
            assert row.duration == pytest.approx(SECONDS, abs=0.15)
            check_clip(load_audio(row.audio), 0.98, slack=0.15, level=1.0)
