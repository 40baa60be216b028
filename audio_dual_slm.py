"""Any form of audio -> mono samples at the model's rate -> what a speech encoder reads, in chunks of at most 30 s."""

import io
import os
import re
import urllib.request

import numpy as np
import torch

try:
    import soundfile
except ImportError:  # arrays at 16 kHz work without it
    soundfile = None
try:
    import soxr
except ImportError:
    soxr = None

CHUNK_SECONDS = 30
MINIMUM_SAMPLES = 400  # what the convolutions of an encoder of waveforms need for one frame


def load_audio(audio, sampling_rate: int | None = None, target_rate: int = 16_000) -> np.ndarray:
    """Reads any form of audio as mono float32 samples at `target_rate`.

    Args:
        audio: one of
            - a path or URL of a file that libsndfile reads (WAV, FLAC, Ogg, MP3 ...), its bytes, or an open file;
            - an array or tensor (samples,), (samples, channels) or (channels, samples), floats in [-1, 1] or integers;
            - a pair (samples, rate), or a dict with "array" and "sampling_rate" as in `datasets`.
        sampling_rate: rate of an array in Hz. Default: `target_rate`.

    Raises:
        ValueError: the audio is empty, is not finite, is out of range, has more than 8 channels or an implausible rate,
            or the file is not audio.
        FileNotFoundError: no such file.
    """
    name = "audio"
    if isinstance(audio, dict):
        if "array" not in audio:
            raise ValueError(f"an audio dict needs 'array' and 'sampling_rate', got the keys {sorted(audio)}.")
        audio, sampling_rate = audio["array"], audio.get("sampling_rate", sampling_rate)
    elif isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0:
        audio, sampling_rate = audio
    if isinstance(audio, os.PathLike):
        audio = os.fspath(audio)
    if isinstance(audio, (bytes, bytearray)):
        audio = io.BytesIO(audio)
    if isinstance(audio, str) or hasattr(audio, "read"):
        name = "audio" if not isinstance(audio, str) else audio if len(audio) < 200 else audio[:200] + "…"
        audio, sampling_rate = _read_file(audio)
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu().numpy()
    samples = _as_mono(np.asarray(audio), name)
    bad = int((~np.isfinite(samples)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {samples.size} samples are NaN or infinite. Repair the recording.")
    peak = float(np.abs(samples).max())
    if peak > 16:
        raise ValueError(f"{name}: float samples peak at {peak:.0f}, not 1. Divide by full scale (32768 for 16 bit).")
    rate = target_rate if sampling_rate is None else sampling_rate
    if not 1_000 <= rate <= 768_000:
        raise ValueError(f"{name}: a sampling rate of {rate} Hz is out of reason (1,000 to 768,000).")
    if rate != target_rate:
        if soxr is None:
            raise ImportError(
                f"{name} has {rate} Hz and the model needs {target_rate}: `pip install soxr` to resample."
            )
        samples = soxr.resample(samples, rate, target_rate)
        if samples.size == 0:
            samples = np.zeros(1, np.float32)
    return samples


def _as_mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples of any type and any number of channels -> (samples,) float32, full scale 1."""
    if samples.dtype == object or samples.dtype.kind not in "fiub":
        raise ValueError(f"{name}: samples of type {samples.dtype} are not audio; give floats in [-1, 1] or integers.")
    if samples.ndim == 2:
        shape = samples.shape
        samples = samples if shape[0] >= shape[1] else samples.T
        if samples.shape[1] > 8:
            raise ValueError(f"{name}: an array of shape {shape} is neither mono nor (samples, channels).")
    elif samples.ndim != 1:
        raise ValueError(f"{name}: an array of shape {samples.shape} is not one clip; pass clips one by one.")
    if samples.size == 0:
        raise ValueError(f"{name}: there are no samples. Leave the turn out, or write it as text.")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind in "iu":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min or -np.iinfo(samples.dtype).max)
    samples = samples.astype(np.float32)
    return samples.mean(axis=1) if samples.ndim == 2 else samples


def _read_file(source) -> tuple[np.ndarray, int]:
    if soundfile is None:
        raise ImportError("reading audio files needs soundfile: `pip install soundfile`.")
    file = source
    if isinstance(source, str) and re.match(r"https?://", source):
        request = urllib.request.Request(source, headers={"User-Agent": "dual-slm"})
        with urllib.request.urlopen(request, timeout=60) as response:
            file = io.BytesIO(response.read())
    try:
        return soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if isinstance(file, str):
            open(file, "rb").close()  # a missing or unreadable file speaks for itself
        raise ValueError(
            f"{source} is not audio that libsndfile reads ({error.error_string.strip()}). Convert it first, for example "
            f"`ffmpeg -i {source} clip.wav`."
        ) from None


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
    features, lengths = [], []
    for chunk in (chunk for group in chunks for chunk in group):
        frames = -(-len(chunk) // hop)
        # Zeros behind the chunk keep the reflection at the end out of its last frames, as in a 30 s window.
        padded = CHUNK_SECONDS * rate if max_length else (frames + 3) * hop
        options = {"sampling_rate": rate, "padding": "max_length", "max_length": padded, "truncation": False}
        mel = feature_extractor(chunk, **options, return_tensors="pt").input_features[0]
        features.append(mel if max_length else mel[:, :frames])
        lengths.append(frames)
    longest = max(feature.shape[1] for feature in features)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {
        "input_features": torch.stack([pad_frames(feature, longest) for feature in features]),
        "input_features_mask": mask.long(),
        "audio_num_chunks": torch.tensor([len(group) for group in chunks]),
    }


def extract_waveforms(clips: list[np.ndarray], feature_extractor) -> dict[str, torch.Tensor]:
    """Waveforms of clips for an encoder that reads these: as [`extract_log_mel`], with (K, samples) tensors."""
    rate = feature_extractor.sampling_rate
    chunks = [split_chunks(clip, rate) for clip in clips]
    waves = []
    for chunk in (chunk for group in chunks for chunk in group):
        padded = np.pad(chunk, (0, max(0, MINIMUM_SAMPLES - len(chunk))))
        waves.append(feature_extractor(padded, sampling_rate=rate, return_tensors="pt").input_values[0])
    pad, ones = torch.nn.utils.rnn.pad_sequence, [torch.ones_like(wave, dtype=torch.long) for wave in waves]
    return {
        "input_features": pad(waves, batch_first=True),
        "input_features_mask": pad(ones, batch_first=True),
        "audio_num_chunks": torch.tensor([len(group) for group in chunks]),
    }


def pad_frames(feature: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind (..., F) up to `length` frames."""
    return torch.nn.functional.pad(feature, (0, length - feature.shape[-1]))
