"""Any form of audio -> mono samples at the model's rate -> what a speech encoder reads, in chunks of at most 30 s."""

import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decoding_dual_slm import (
    BLOCK_VALUES,
    MAX_CHANNELS,
    MAX_SECONDS,
    MAX_VALUES,
    AudioError,
    EncodedAudio,
    container,
)

try:
    import soxr
except ImportError:  # arrays at 16 kHz work without it
    soxr = None

CHUNK_SECONDS = 30
MINIMUM_SAMPLES = 400  # what the convolutions of an encoder of waveforms need for one frame
SPOOL_SECONDS = 600  # samples of longer clips are in a temporary file, whose pages the system can drop
_HELD_BLOCKS = 16  # of a clip of several channels; a longer one is decoded twice


def load_audio(
    audio, sampling_rate: int | None = None, target_rate: int = 16_000, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Reads any form of audio as mono float32 samples at `target_rate`.

    Channels that carry no speech are left out, and the others are averaged at the level of the loudest. Files are decoded
    by libsndfile (WAV, FLAC, Ogg, MP3 ...), others by ffmpeg if it is on the PATH (WebM, M4A, MP4, AMR, WMA ...). A file
    that is cut short is read as far as it goes, with a warning.

    Args:
        audio: one of
            - a path, a `file:`, `http(s):` or `data:` URL, encoded bytes in any buffer, or an open binary file;
            - an array or tensor (samples,), (samples, channels) or (channels, samples), floats in [-1, 1] or integers;
            - a pair (samples, rate) or (rate, samples), or a dict with "array" and "sampling_rate";
            - an `AudioDecoder`, or a dict with "bytes" or "path", as `datasets` has.
        sampling_rate: rate of an array in Hz. Default: `target_rate`.
        max_seconds: a longer clip is refused, by its header or while it is decoded.

    Raises:
        ValueError: the audio is empty, longer than `max_seconds`, not finite or out of range, its channels cancel, it has
            more than 8 of them or an implausible rate, or it is no audio that can be decoded.
        OSError: no such file.
    """
    clip = _open(audio, sampling_rate, target_rate, max_seconds)
    with clip if isinstance(clip, EncodedAudio) else nullcontext():
        rate = clip.rate
        if not 1_000 <= rate <= 768_000:
            raise ValueError(f"{clip.name}: a sampling rate of {rate} Hz is out of reason (1,000 to 768,000).")
        if rate != target_rate and soxr is None:
            raise ImportError(
                f"{clip.name} has {rate} Hz and the model needs {target_rate}: `pip install soxr` to resample."
            )
        return _collect(_resample(_check(_mix(clip), clip.name), rate, target_rate), target_rate)


@dataclass
class _ArrayAudio:
    """Samples (frames, channels) of any type, read block by block as `EncodedAudio` is."""

    samples: np.ndarray
    rate: float
    name: str = "audio"

    def __post_init__(self):
        self.samples = _as_frames(self.samples, self.name)
        self.channels = self.samples.shape[1]
        self._middle, self._scale = _find_scale(self.samples, self.name)

    def blocks(self) -> Iterator[np.ndarray]:
        size = BLOCK_VALUES // self.channels
        for start in range(0, len(self.samples), size):
            block = self.samples[start : start + size].astype(np.float32)
            yield (block - self._middle) / self._scale if self._scale != 1 else block


def _unwrap(audio: Any, rate: Any, max_seconds: float) -> tuple[Any, Any, str | None]:
    """What dicts, pairs and decoders hold: samples or encoded audio, its rate and its name."""
    name = None
    if isinstance(audio, dict):
        known = {key: value for key, value in audio.items() if value is not None}
        name = known.get("path")
        found = next((key for key in ("array", "raw", "bytes", "path") if key in known), None)
        if found is None:
            raise ValueError(
                f"an audio dict needs 'array' and 'sampling_rate', or 'bytes' or 'path'; got the keys {sorted(audio)} "
                f"with {'no value' if not known else 'values of ' + str(sorted(known))}."
            )
        audio, rate = known[found], known.get("sampling_rate", rate)
    elif isinstance(audio, (tuple, list)) and len(audio) == 2 and sum(_is_rate(item) for item in audio) == 1:
        return *(audio if _is_rate(audio[1]) else audio[::-1]), None  # pyright: ignore
    if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` gives
        seconds = getattr(getattr(audio, "metadata", None), "duration_seconds", None) or 0
        if seconds > max_seconds:
            raise AudioError(f"the audio lasts {seconds:,.0f} s; at most {max_seconds:,.0f} s are read.", "overlong")
        audio = audio.get_all_samples()  # pyright: ignore
    if hasattr(audio, "sample_rate") and hasattr(audio, "data"):  # its AudioSamples
        audio, rate = audio.data, audio.sample_rate  # pyright: ignore
    return audio, rate, name


def _open(audio: Any, rate: Any, target_rate: int, max_seconds: float) -> EncodedAudio | _ArrayAudio:
    """What holds the samples: encoded audio, or an array with its rate."""
    audio, rate, name = _unwrap(audio, rate, max_seconds)
    if audio is None:
        raise ValueError("there is no audio (None): the microphone recorded nothing. Leave the turn out, or type it.")
    if isinstance(audio, os.PathLike):
        audio = os.fspath(audio)
    if isinstance(audio, (memoryview, mmap.mmap)) or type(audio).__module__ == "array":
        view = memoryview(audio)
        audio = view.tobytes() if view.format in "Bbc" else np.asarray(audio)
    if isinstance(audio, (str, bytes, bytearray)) or hasattr(audio, "read"):
        return EncodedAudio(audio, name, max_seconds)
    samples = _as_array(audio)
    if samples.dtype in (np.uint8, np.int8) and samples.ndim == 1 and container(samples[:64].tobytes()):
        return EncodedAudio(samples.tobytes(), name, max_seconds)
    clip = _ArrayAudio(samples, target_rate if rate is None else _as_rate(rate), name or "audio")
    frames = len(clip.samples)
    if frames > max_seconds * clip.rate or clip.samples.size > MAX_VALUES:
        seconds = f"lasts {frames / clip.rate:,.0f} s; at most {max_seconds:,.0f} s and {MAX_VALUES:,} values are read"
        raise AudioError(f"{clip.name} {seconds}. Cut it into parts.", "overlong")
    return clip


def _is_rate(value: Any) -> bool:
    return value is None or (np.ndim(value) == 0 and isinstance(value, (int, float, np.number)))


def _as_rate(rate: Any) -> float:
    try:
        return int(rate) if int(rate) == float(rate) else float(rate)
    except (TypeError, ValueError):
        raise ValueError(f"a sampling rate of {rate!r} is no number of Hz.") from None


def _as_array(audio: Any) -> np.ndarray:
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.dtype in (torch.bfloat16, torch.float16) else audio).numpy()
    try:
        samples = np.asarray(audio)
    except ValueError:
        raise ValueError(
            f"audio: the items of this {type(audio).__name__} have different lengths, so they are not the samples of "
            "one clip; pass clips one by one."
        ) from None
    return samples.astype(np.float32) if samples.dtype.name == "bfloat16" else samples


def _as_frames(samples: np.ndarray, name: str) -> np.ndarray:
    """An array of samples as (frames, channels)."""
    if samples.dtype.kind not in "fiu":
        raise ValueError(f"{name}: samples of type {samples.dtype} are not audio; give floats in [-1, 1] or integers.")
    if samples.ndim not in (1, 2):
        raise ValueError(f"{name}: an array of shape {samples.shape} is not one clip; pass clips one by one.")
    if samples.size == 0:
        raise ValueError(f"{name}: there are no samples. Leave the turn out, or write it as text.")
    if samples.ndim == 1:
        return samples[:, None]
    frames = samples if samples.shape[0] >= samples.shape[1] else samples.T
    if frames.shape[1] > MAX_CHANNELS:
        raise ValueError(f"{name}: an array of shape {samples.shape} is neither mono nor (samples, channels).")
    return frames


def _find_scale(samples: np.ndarray, name: str) -> tuple[float, float]:
    """The middle and the full scale of samples: 0 and 1 of floats.

    Integers of more than 16 bits may hold fewer, as a list of 16-bit samples does: what they hold tells their scale.
    """
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f":
        return 0, 1
    if kind == "u":
        middle = 2 ** (bits - 1)
        if bits > 32 or not 0.5 <= float(np.median(samples[:: max(1, len(samples) // 2**20)])) / middle <= 1.5:
            raise ValueError(
                f"{name}: {samples.dtype} samples that do not lie around {middle:,} are no audio. Convert them to floats "
                "in [-1, 1]; encoded audio comes as bytes."
            )
        return middle, middle
    if bits <= 16:
        return 0, 2 ** (bits - 1)
    peak = max(int(samples.max()), -int(samples.min()))
    if bits == 32 and (peak > 2**23 or not (samples & 0xFF).any()):  # fewer bits, moved to the left, stay quiet
        return 0, 2**31
    if 0 < peak < 2**7 or peak > 2**31:
        raise ValueError(
            f"{name}: {samples.dtype} samples peak at {peak:,}, which tells no scale. Divide by full scale "
            "(32768 for 16 bit)."
        )
    return 0, 2**15 if peak <= 2**15 else 2**23 if peak <= 2**23 else 2**31


def _mix(clip: EncodedAudio | _ArrayAudio) -> Iterator[np.ndarray]:
    """Blocks of mono samples."""
    blocks = clip.blocks()
    if clip.channels == 1:
        yield from (block[:, 0] for block in blocks)
        return
    held = list(itertools.islice(blocks, _HELD_BLOCKS + 1))
    whole = len(held) <= _HELD_BLOCKS
    weights = _weigh_channels(itertools.chain(held, blocks), clip.channels, clip.rate, clip.name)
    for block in held if whole else clip.blocks():
        yield block @ weights


def _weigh_channels(blocks: Iterable[np.ndarray], channels: int, rate: float, name: str) -> np.ndarray:
    """Weights (channels,) of a mix at the level of the loudest channel, without channels that carry no speech.

    Second differences over half a millisecond stand for speech: hum, rumble and offsets are small in them. A channel whose
    loudest tenth of a second is 20 dB below that of the loudest channel is left out. Channels that take turns, as on a
    recorded call, are added; others are averaged. An average that is quiet is weighted by power instead.

    Raises:
        ValueError: two channels cancel.
    """
    lag, frame = max(1, int(rate) // 2_000), max(1, int(rate) // 10)
    power, loudest, leading = np.zeros((channels, channels)), np.zeros(channels), 0.0
    for block in blocks:
        block = np.nan_to_num(block, posinf=0, neginf=0).astype(np.float64)
        for _ in range(2):
            block = block[lag:] - block[:-lag] if len(block) > lag else block
        power += block.T @ block
        energies = np.add.reduceat(block**2, range(0, len(block), frame))
        loudest, leading = np.maximum(loudest, energies.max(0)), leading + energies.max(1).sum()
    if not loudest.any():
        return np.full(channels, 1 / channels, np.float32)
    kept = loudest >= loudest.max() / 100
    levels = np.sqrt(np.diag(power))
    for one, other in itertools.combinations(np.flatnonzero(kept), 2):
        if power[one, other] < -0.7 * levels[one] * levels[other]:
            raise ValueError(
                f"{name}: channels {one + 1} and {other + 1} cancel (opposite phase). Pass one of them, or turn one over."
            )
    weights, shares = kept / kept.sum(), kept * np.diag(power)
    if leading >= 0.9 * shares.sum():
        weights = kept.astype(float)
    elif levels.max() > 1.12 * math.sqrt(weights @ power @ weights):  # the average is 1 dB too quiet
        weights = shares * levels.max() / math.sqrt(shares @ power @ shares)
    return weights.astype(np.float32)


def _check(blocks: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """The blocks, if they are finite and in range."""
    bad = total = 0
    for block in blocks:
        bad, total = bad + int((~np.isfinite(block)).sum()), total + len(block)
        peak = float(np.abs(block).max()) if not bad else 0.0
        if peak > 16:
            raise ValueError(
                f"{name}: float samples peak at {peak:.0f}, not 1. Divide by full scale (32768 for 16 bit)."
            )
        yield block
    if bad:
        raise ValueError(f"{name}: {bad} of {total} samples are NaN or infinite. Repair the recording.")


def _resample(blocks: Iterator[np.ndarray], rate: float, target_rate: int) -> Iterator[np.ndarray]:
    """The blocks at another rate; the same samples as if all were resampled at once."""
    if rate == target_rate:
        yield from blocks
        return
    assert soxr is not None
    stream = soxr.ResampleStream(rate, target_rate, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _collect(blocks: Iterator[np.ndarray], rate: int) -> np.ndarray:
    """The blocks as one array, in a nameless temporary file if they are long."""
    held, size = [], 0
    for block in blocks:
        held.append(block)
        size += len(block)
        if size > SPOOL_SECONDS * rate:
            break
    else:
        return np.concatenate(held) if size else np.zeros(1, np.float32)
    with tempfile.TemporaryFile() as file:
        for block in itertools.chain(held, blocks):
            file.write(np.ascontiguousarray(block).data)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.float32)


def _drop_pages(clip: np.ndarray) -> None:
    """Gives back the memory of a clip that lies in a temporary file; it is read again where it is needed."""
    while isinstance(clip, np.ndarray) and clip.base is not None:
        clip = clip.base
    pages = clip.obj if isinstance(clip, memoryview) else clip
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def split_chunks(clip: np.ndarray, sampling_rate: int) -> list[np.ndarray]:
    """A clip as chunks of at most 30 s."""
    size = CHUNK_SECONDS * sampling_rate
    return [clip[start : start + size] for start in range(0, len(clip), size)]


def count_frames(num_samples: int, feature_extractor, audio_conv: list[list[int]] | None) -> int:
    """Encoder frames of a clip of so many samples, all its chunks together.

    Args:
        audio_conv: kernels and strides of an encoder of waveforms; `None` for a Whisper.
    """
    size = CHUNK_SECONDS * feature_extractor.sampling_rate
    frames = 0
    for start in range(0, num_samples, size):
        samples = min(size, num_samples - start)
        if audio_conv is None:
            mel = -(-samples // feature_extractor.hop_length)
            frames += (mel + 1) // 2
            continue
        samples = max(samples, MINIMUM_SAMPLES)
        for kernel, stride in zip(*audio_conv, strict=True):
            samples = (samples - kernel) // stride + 1
        frames += samples
    return frames


def extract_log_mel(clips: list[np.ndarray], feature_extractor, max_length: bool) -> dict[str, torch.Tensor]:
    """Log-mel of clips for a Whisper.

    Args:
        clips: mono float32 samples at the extractor's rate.
        max_length: pad each chunk to 30 s; else to the longest one.

    Returns:
        `input_features` (K, mel bins, F), `input_features_mask` (K, F) by the real length, `audio_num_chunks` (A,).
    """
    rate, hop = feature_extractor.sampling_rate, feature_extractor.hop_length
    chunks = [split_chunks(clip, rate) for clip in clips]
    lengths = [-(-len(chunk) // hop) for group in chunks for chunk in group]
    longest = CHUNK_SECONDS * rate // hop if max_length else max(lengths)
    features, row = torch.zeros(len(lengths), feature_extractor.feature_size, longest), 0
    for clip, group in zip(clips, chunks, strict=True):
        for chunk in group:
            # Zeros behind the chunk keep the reflection at the end out of its last frames, as in a 30 s window.
            padded = CHUNK_SECONDS * rate if max_length else (lengths[row] + 3) * hop
            options = {"sampling_rate": rate, "padding": "max_length", "max_length": padded, "truncation": False}
            mel = feature_extractor(chunk, **options, return_tensors="pt").input_features[0]
            used = longest if max_length else lengths[row]
            features[row, :, :used] = mel[:, :used]
            row += 1
            _drop_pages(clip)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {
        "input_features": features,
        "input_features_mask": mask.long(),
        "audio_num_chunks": torch.tensor([len(group) for group in chunks]),
    }


def extract_waveforms(clips: list[np.ndarray], feature_extractor) -> dict[str, torch.Tensor]:
    """Waveforms of clips for an encoder that reads these: as [`extract_log_mel`], with (K, samples) tensors."""
    rate, row = feature_extractor.sampling_rate, 0
    chunks = [split_chunks(clip, rate) for clip in clips]
    lengths = torch.tensor([max(MINIMUM_SAMPLES, len(chunk)) for group in chunks for chunk in group])
    waves = torch.zeros(len(lengths), int(lengths.max()))
    for clip, group in zip(clips, chunks, strict=True):
        for chunk in group:
            padded = np.pad(chunk, (0, max(0, MINIMUM_SAMPLES - len(chunk))))
            wave = feature_extractor(padded, sampling_rate=rate, return_tensors="pt").input_values[0]
            waves[row, : len(wave)] = wave
            row += 1
            _drop_pages(clip)
    return {
        "input_features": waves,
        "input_features_mask": (torch.arange(waves.shape[1]) < lengths[:, None]).long(),
        "audio_num_chunks": torch.tensor([len(group) for group in chunks]),
    }


def pad_frames(feature: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind (..., F) up to `length` frames."""
    return torch.nn.functional.pad(feature, (0, length - feature.shape[-1]))
