"""Encoded audio -> blocks of samples, by libsndfile and else by ffmpeg, within limits of size, duration and time."""

import base64
import binascii
import io
import itertools
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from transformers.utils import logging

try:
    import soundfile
except ImportError:  # arrays work without it
    soundfile = None

logger = logging.get_logger(__name__)

MAX_SECONDS = 3_600  # of one clip
MAX_VALUES = MAX_SECONDS * 192_000 * 2  # frames x channels of one clip: an hour of stereo at 192 kHz
MAX_CHANNELS = 8
MAX_BYTES = 2**30  # of what comes from a URL or a pipe, or goes to ffmpeg
FFMPEG_SECONDS = 300  # that ffmpeg may take for one clip
NO_FFMPEG = "no ffmpeg for"  # a kind of AudioError
UNKNOWN = 2**62  # frames, where libsndfile does not know them
BLOCK_VALUES = 2**19  # frames x channels of a block: 2 MB
_STEP = 4_096  # frames of one call of libsndfile, which loses what it read before an error

# What a container begins with. A list of bytes that begins so is a file, not 8-bit samples.
_SOUNDFILE_MAGIC = re.compile(
    rb"RI(FF|FX)....WAVE|RF64....WAVE|FORM....AIF[FC]|fLaC|OggS|ID3[\x02-\x04]|caff\x00\x01|\.snd\x00\x00\x00|riff\x2e\x91"
    rb"|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]",
    re.DOTALL,
)
_FFMPEG_MAGIC = {
    rb"\x1a\x45\xdf\xa3": "WebM or Matroska",
    rb"....ftyp": "MP4 or M4A",
    rb"#!AMR": "AMR",
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "WMA or ASF",
    rb"\xff[\xf0\xf1\xf8\xf9][\x40-\xbf]": "AAC",
    rb"RIFF....AVI |FLV\x01": "a video",
}
# Containers that ffmpeg may open: none that names other files or hosts, as playlists do.
_DEMUXERS = (
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,asf,amr,amrnb,amrwb,aac,ac3,eac3,flac,mp3,ogg,wav,w64,aiff,au,caf,avi,flv,"
    "mpegts,mpeg,ape,wv,tta,dsf,gsm,g722"
)


class AudioError(ValueError):
    """Audio that cannot be read. `kind` is the reason in a word or two, for reports."""

    def __init__(self, message: str, kind: str = "damaged"):
        super().__init__(message)
        self.kind = kind


def container(data: bytes) -> str | None:
    """What kind of file bytes are by how they begin; `None` if no container that we know begins so."""
    if _SOUNDFILE_MAGIC.match(data):
        return "audio"
    return next((kind for magic, kind in _FFMPEG_MAGIC.items() if re.match(magic, data, re.DOTALL)), None)


class EncodedAudio:
    """An encoded clip that can be decoded block by block, as often as needed.

    Args:
        source: a path, a `file:`, `http(s):` or `data:` URL, bytes, or a binary file, which is read from its start.
        name: what errors call it. Default: the path or URL.
        max_seconds: a longer clip is refused, by its header or while it is decoded.

    Attributes:
        rate: Hz.
        channels: 1 to `MAX_CHANNELS`.

    Raises:
        AudioError: it is empty, too long, or no audio that libsndfile or ffmpeg reads.
        OSError: no such file, or the URL does not answer.
    """

    def __init__(self, source: Any, name: str | None = None, max_seconds: float = MAX_SECONDS):
        if soundfile is None:
            raise ImportError("reading audio files needs soundfile: `pip install soundfile`.")
        self.name = name or (_shorten(source) if isinstance(source, str) else "audio")
        self.max_seconds, self._path = max_seconds, None
        if isinstance(source, str):
            source = self._resolve(source)
        encoded = isinstance(source, (bytes, bytearray, memoryview))
        self._file = io.BytesIO(source) if encoded else _seekable(source, self.name)
        self._size = self._file.seek(0, os.SEEK_END)
        if self._size == 0:
            raise AudioError(f"{self.name} is empty (0 bytes): the recording or the upload failed.", "empty")
        self._fixes, self._missing, self._fault = _read_promise(self._file, self._size)
        self._warned, self._refusal, self._started = False, "", None
        self._run, self.frames = self._run_libsndfile, 0
        try:
            with soundfile.SoundFile(self._view()) as opened:
                self.rate, self.channels, self.frames = opened.samplerate, opened.channels, opened.frames
        except soundfile.LibsndfileError as error:
            self._refusal, self._run = error.error_string.strip().rstrip("."), self._run_ffmpeg
        if self._refusal:
            run = self._run()
            self._started = itertools.chain([next(run, np.empty((0, 1), np.float32))], run)
        if self.channels > MAX_CHANNELS:
            raise AudioError(f"{self.name} has {self.channels} channels, at most {MAX_CHANNELS}: pass one alone.")
        if self.frames < UNKNOWN:
            self._check_length(self.frames, "by its header")

    def __enter__(self) -> "EncodedAudio":
        return self

    def __exit__(self, *_) -> None:
        if self._path is not None:  # else it is the caller's
            self._file.close()

    def blocks(self) -> Iterator[np.ndarray]:
        """The clip from its start: blocks (frames, channels) float32. A clip that is cut short ends early, with a warning."""
        run, self._started = self._started or self._run(), None
        decoded = 0
        for block in run:
            decoded += len(block)
            self._check_length(decoded, "or more")
            yield block
        if decoded == 0:
            raise AudioError(f"{self.name}: there are no samples. Leave the turn out, or write it as text.", "empty")
        missing = (self.frames - decoded) / self.rate if decoded < self.frames < UNKNOWN else 0.0
        missing = max(missing, self._missing * decoded / self.rate)
        if not self._warned and (missing > 0.1 or self._fault):
            what = self._fault or f"{missing:.1f} s are missing"
            logger.warning(
                f"{self.name} was cut short: {what}, and the {decoded / self.rate:.1f} s that are there are used."
            )
        self._warned = True

    def seconds(self) -> float:
        """How long the clip is: by its header if libsndfile reads it, else decoded."""
        if self._run == self._run_libsndfile and 0 < self.frames < UNKNOWN:
            return self.frames / self.rate
        return sum(len(block) for block in self.blocks()) / self.rate

    # ---- where it comes from ---------------------------------------------------------------------------------------

    def _resolve(self, source: str) -> Any:
        """A path or URL -> an open file, or bytes."""
        if source.startswith("data:"):
            head, comma, body = source.partition(",")
            try:
                if not comma:
                    raise ValueError("it has no comma")
                body = urllib.parse.unquote_to_bytes(body)
                return base64.b64decode(body, validate=True) if head.rstrip().endswith(";base64") else body
            except (binascii.Error, ValueError) as error:
                raise AudioError(f"{self.name} is no valid data URI ({error}).") from None
        if re.match(r"https?://", source):
            request = urllib.request.Request(source, headers={"User-Agent": "dual-slm"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return _copy(response, tempfile.TemporaryFile(), self.name)
        if source.startswith("file://"):
            source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
        if not source or len(source) > 4_096 or "\0" in source:
            cure = "base64 needs `data:audio/wav;base64,` in front." if source else "name a file."
            raise AudioError(f"{self.name!r} is neither a path nor a URL: {cure}")
        if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
            raise AudioError(f"{source} is a pipe or a device, not a file: open it and pass the open file.")
        self._path = os.path.abspath(source)
        return open(source, "rb")

    def _check_length(self, frames: int, how: str) -> None:
        seconds = frames / self.rate
        if seconds > self.max_seconds or frames * self.channels > MAX_VALUES:
            raise AudioError(
                f"{self.name} lasts {seconds:,.0f} s {how} ({self.channels} channels at {self.rate} Hz); at most "
                f"{self.max_seconds:,.0f} s and {MAX_VALUES:,} values are read. Cut it into parts.",
                "overlong",
            )

    def _view(self) -> Any:
        return _View(self._file, self._fixes)

    # ---- decoders --------------------------------------------------------------------------------------------------

    def _run_libsndfile(self) -> Iterator[np.ndarray]:
        assert soundfile is not None
        size = max(1, BLOCK_VALUES // self.channels // _STEP) * _STEP
        with soundfile.SoundFile(self._view()) as opened:
            opened.seekable = lambda: False  # else it seeks after each read, which disturbs the decoder of MP3
            going = True
            while going:
                block, filled = np.empty((size, self.channels), np.float32), 0
                while going and filled < size:
                    try:
                        count = len(opened.read(out=block[filled : filled + _STEP]))
                    except soundfile.LibsndfileError:  # cut short or damaged from here on
                        count = 0
                    filled, going = filled + count, count > 0
                if filled:
                    yield block[:filled]

    def _run_ffmpeg(self) -> Iterator[np.ndarray]:
        if self._path is not None:
            yield from self._read_ffmpeg(self._path)
            return
        with tempfile.TemporaryDirectory() as folder:  # not standard input: the index of a phone's MP4 is at its end
            path = os.path.join(folder, "audio")
            with open(path, "wb") as copy:
                self._file.seek(0)
                shutil.copyfileobj(self._file, copy)
            yield from self._read_ffmpeg(path)

    def _read_ffmpeg(self, path: str) -> Iterator[np.ndarray]:
        """Blocks of what ffmpeg writes as Sun audio, whose header gives rate and channels."""
        command = [self._find_ffmpeg(), "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
        command += ["-max_alloc", str(2**28), "-protocol_whitelist", "file,pipe", "-format_whitelist", _DEMUXERS]
        command += ["-i", f"file:{path}", "-map", "0:a:0", "-t", str(self.max_seconds + 1)]
        command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        late = threading.Event()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
            pipe: Any = process.stdout
            timer = threading.Timer(FFMPEG_SECONDS, lambda: (late.set(), process.kill()))
            timer.daemon = True
            timer.start()
            try:
                header = pipe.read(24)
                if len(header) == 24:
                    start, self.rate, self.channels = struct.unpack(">4xI8xII", header)
                    pipe.read(start - 24)
                    width = 4 * self.channels
                    while data := pipe.read(BLOCK_VALUES // self.channels * width):
                        samples = np.frombuffer(data, ">f4", len(data) // width * self.channels)
                        yield samples.reshape(-1, self.channels).astype(np.float32)
                process.wait()
                if late.is_set():
                    raise AudioError(f"{self.name}: ffmpeg was stopped after {FFMPEG_SECONDS} s.", "overlong")
                self._read_log(log, nothing=len(header) < 24)
            finally:  # also where nobody reads on
                timer.cancel()
                process.kill()
                process.wait()
                pipe.close()

    def _find_ffmpeg(self) -> str:
        command = shutil.which("ffmpeg")
        if command is None:
            self._file.seek(0)
            kind = container(self._file.read(64))
            raise AudioError(
                f"{self.name} is not audio that libsndfile reads ({self._refusal}). {kind or 'Any other format'} needs "
                "ffmpeg, which is missing on the PATH: `apt-get install ffmpeg` (or brew, conda, winget).",
                "damaged" if kind in (None, "audio") else NO_FFMPEG,
            )
        if self._size > MAX_BYTES:
            raise AudioError(f"{self.name} has {self._size:,} bytes; ffmpeg gets {MAX_BYTES:,} at most.", "overlong")
        return command

    def _read_log(self, log: BinaryIO, nothing: bool) -> None:
        """Raises what ffmpeg says if nothing came, and notes how long the clip should be if its end is damaged."""
        log.seek(0)
        text = log.read(2**20).decode(errors="replace")
        errors = re.findall(r"\[(?:error|fatal)\] (.*)", text)
        if nothing:
            reason = errors[0].strip().rstrip(".") if errors else "no sound in it"
            raise AudioError(
                f"{self.name} is not audio that libsndfile reads ({self._refusal}), nor ffmpeg ({reason}). Is it whole?"
            )
        length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
        if errors and length:  # without errors the picture of a video may just be longer
            hours, minutes, seconds = map(float, length.groups())
            self.frames = round((3_600 * hours + 60 * minutes + seconds) * self.rate)


class _View(io.RawIOBase):
    """A binary file with some bytes replaced. It has no name, so that soundfile goes by the content alone."""

    def __init__(self, file: BinaryIO, fixes: dict[int, bytes]):
        self._file, self._fixes = file, fixes
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer) -> int:  # pyright: ignore
        start = self._file.tell()
        data = bytearray(self._file.read(len(buffer)))
        for place, fix in self._fixes.items():
            for offset, value in enumerate(fix, place - start):
                if 0 <= offset < len(data):
                    data[offset] = value
        buffer[: len(data)] = data
        return len(data)


def _read_promise(file: BinaryIO, size: int) -> tuple[dict[int, bytes], float, str]:
    """What a WAV or AIFF header says of its samples, against the bytes that are there; whether an Ogg file has an end.

    Returns:
        The bytes that repair a WAV's header of no samples (a recorder that crashed); the share of samples that is
        missing, relative to those that are there; and what is wrong if that is not a number of samples.
    """
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"OggS"):
        file.seek(max(0, size - 2**17))
        _, mark, page = file.read().rpartition(b"OggS")
        return {}, 0.0, "its last page is missing" if mark and len(page) > 1 and not page[1] & 4 else ""
    order = {b"RIFF": "<", b"RIFX": ">", b"FORM": ">"}.get(head[:4])
    if order is None or head[8:] not in (b"WAVE", b"AIFF", b"AIFC"):
        return {}, 0.0, ""
    place = 12
    for _ in range(1_000):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return {}, 0.0, ""
        name, promised = struct.unpack(f"{order}4sI", head)
        if name in (b"data", b"SSND"):
            break
        place += 8 + promised + promised % 2
    else:
        return {}, 0.0, ""
    there = size - place - 8
    if (
        name == b"data"
        and promised == 0
        and there > 0
        and not re.match(rb"LIST|id3 |ID3 |fact|bext|cue ", file.read(4))
    ):
        fixes = {4: struct.pack(f"{order}I", min(size - 8, 2**32 - 1))}
        return fixes | {place + 4: struct.pack(f"{order}I", min(there, 2**32 - 1))}, 0.0, "its header says 0 s"
    unknown = promised >= 2**31 - 2**16  # a pipe's header
    return {}, max(0.0, (promised - there) / there) if there > 0 and not unknown else 0.0, ""


def _seekable(file: Any, name: str) -> Any:
    """An open file, or a temporary copy of what a pipe, a response or an asynchronous upload's file gives."""
    inner = getattr(file, "file", None)  # of an upload (FastAPI), whose own methods are coroutines
    if hasattr(inner, "read") and not isinstance(file, io.IOBase):
        file = inner
    try:
        if not (hasattr(file, "seekable") and not file.seekable()):
            file.seek(0)
            if isinstance(file.read(0), bytes):
                return file
    except (AttributeError, OSError):
        pass
    return _copy(file, tempfile.TemporaryFile(), name)


def _copy(file: Any, target: Any, name: str) -> BinaryIO:
    size = 0
    while data := file.read(2**16):
        if not isinstance(data, bytes):
            raise AudioError(f"{name} gives {type(data).__name__}, not bytes: open it in binary mode (`rb`).")
        size += len(data)
        if size > MAX_BYTES:
            raise AudioError(f"{name} has more than {MAX_BYTES:,} bytes.", "overlong")
        target.write(data)
    return target


def _shorten(text: str) -> str:
    return text if len(text) < 200 else text[:60] + "…" if text.startswith("data:") else text[:200] + "…"
