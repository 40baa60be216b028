"""Checks rows against their audio files: what is missing, damaged or repeated is counted and left out."""

import errno
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile

from ...audio_dual_slm import load_audio
from ...decoding_dual_slm import NO_FFMPEG, AudioError, EncodedAudio
from ..files import atomic
from .row import Row

_VIDEO = {".mp4", ".mkv", ".avi", ".mov", ".webm"}


class Report(Counter):
    """Counts of each kind of fault, and the first example of each."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, kind: str, example: str) -> None:
        self[kind] += 1
        self.first.setdefault(kind, example)

    def __str__(self) -> str:
        return "\n".join(f"{count:,} x {kind}; the first: {self.first[kind]}" for kind, count in self.items())


def check_rows(
    rows: Iterable[Row], report: Report, allow_missing_audio: bool = False, audio_folder: Path | None = None
) -> Iterator[Row]:
    """Rows whose audio exists and has a readable header, with their `duration`; ids are unique.

    Args:
        report: counts the rows that are left out: missing, empty, damaged or overlong audio, audio that needs ffmpeg
            where there is none, repeated ids. If none remains, that is an error.
        allow_missing_audio: keep a row without its audio instead, as text.
        audio_folder: where the audio of videos is written; it stays there. Default: videos are read as they are.
    """
    seen, kept, lost, rows = set(), 0, 0, iter(rows)
    remedy = "kept as text" if allow_missing_audio else "left out (--allow-missing-audio keeps the text)"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while part := list(itertools.islice(rows, 256)):  # in parts, so that memory stays flat
            for row, fault in pool.map(_inspect, part, itertools.repeat(audio_folder)):
                if row.id in seen:
                    report.add("repeated id, left out", row.id)
                    continue
                seen.add(row.id)
                if fault is not None:
                    lost += fault == "missing"
                    report.add(f"{fault} audio, {remedy}", row.audio or "")
                    row = row.replace(audio=None)
                if fault is None or allow_missing_audio:
                    kept += 1
                    yield row
    if lost and not kept:
        example = next(example for kind, example in report.first.items() if kind.startswith("missing"))
        raise FileNotFoundError(
            f"none of the {lost:,} audio files exists; the first is {example}. Is --root the root of the corpus? "
            "`--allow-missing-audio` keeps the text alone."
        )
    if report and not kept:
        raise ValueError(f"no row is left. {report}")


def _inspect(row: Row, audio_folder: Path | None) -> tuple[Row, str | None]:
    """The row with its duration, and the fault of its audio: missing, a kind of `AudioError` or None."""
    if row.audio is None:
        return row, None
    path = Path(row.audio)
    if not path.is_file():
        return row, "missing"
    try:
        if path.suffix.lower() in _VIDEO and audio_folder is not None:
            path = _extract_audio(path, audio_folder, row.id)
        with EncodedAudio(str(path)) as clip:
            return row.replace(audio=str(path), duration=clip.seconds()), None
    except AudioError as error:
        return row, error.kind


def _extract_audio(video: Path, folder: Path, name: str) -> Path:
    """Audio of a video as 16 kHz mono FLAC in `folder`; an existing file is kept."""
    target = folder / f"{name}.flac"
    if target.is_file():
        return target
    try:
        samples = load_audio(str(video), target_rate=16_000)
    except AudioError as error:
        if error.kind == NO_FFMPEG:
            raise FileNotFoundError("ffmpeg is missing: `apt-get install ffmpeg` (or brew, conda, winget).") from None
        raise
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16")
    with atomic(target) as scratch:
        try:
            scratch.write_bytes(buffer.getbuffer())
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
            raise OSError(error.errno, f"{target}: {reason}") from None
    return target
