"""What a message from outside may bring: one policy, strict by default."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np

from ...audio_dual_slm import load_audio
from ...turns_dual_slm import AUDIO_MARK

REDIRECTS = 3
MAX_SAMPLES_PER_SECOND = 192_000  # of all channels; bounds the memory of a decoded clip


class Refused(ValueError):
    """A message that the policy or the server refuses; the text is for its sender.

    Args:
        message: value, cause and cure.
        status: of HTTP.
        code: OpenAI's short name of the error.
        param: the place in the message.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Policy:
    """Limits of one message. Audio comes as bytes; files of this machine cannot be named.

    Args:
        max_bytes: of one encoded clip.
        max_seconds: of one clip, enforced while it is decoded.
        max_clips, max_messages, max_characters: of one conversation, its text all together.
        max_request_bytes: of a request's body.
        hosts: hosts that clips may be fetched from by `http` or `https`. They must have public addresses; a private
            address has to be listed itself.
        fetch_seconds: for a URL, redirects and download together.
    """

    max_bytes: int = 20_000_000
    max_seconds: float = 120.0
    max_clips: int = 16
    max_messages: int = 200
    max_characters: int = 50_000
    max_request_bytes: int = 40_000_000
    hosts: tuple[str, ...] = ()
    fetch_seconds: float = 10.0

    # ---- text

    def check_text(self, text: str, tokenizer: Any) -> None:
        """Refuses text that is no text, and text that holds a special token of the tokenizer.

        Raises:
            Refused: such a token could end a turn and begin another one.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused(f"a text has the lone surrogate {text[error.start]!a}: send valid Unicode.") from None
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        found = special.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
        if found or AUDIO_MARK in text:
            names = sorted(tokenizer.convert_ids_to_tokens(sorted(found))) or [AUDIO_MARK]
            raise Refused(
                f"a text holds {names[0]!a}, which is reserved for the chat template. Leave it out, or write it with "
                "a space inside."
            )

    # ---- audio

    def read_base64(self, data: str) -> bytes:
        """Raises:
        Refused: it is too long, or no base64."""
        if len(data) > self.max_bytes * 4 // 3 + 4:
            raise self._too_big(len(data) * 3 // 4)
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            shown = ascii(data[:40])
            raise Refused(
                f"the audio {shown} is no base64. Send the bytes of a WAV, FLAC, Ogg or MP3 file in base64; file names are "
                "not read."
            ) from None

    def read_url(self, url: str) -> bytes:
        """The bytes of a data URI, or of an `http(s)` URL whose host is allowed.

        Raises:
            Refused: any other URL, or one that cannot be fetched within the limits.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            head, comma, data = url.partition(",")
            if not comma:
                raise Refused(f"the data URI {url[:40]!a} has no comma. Write data:audio/wav;base64,DATA.")
            if head.endswith(";base64"):
                return self.read_base64(data)
            if len(data) > 3 * self.max_bytes:
                raise self._too_big(len(data) // 3)
            return unquote_to_bytes(data)
        if scheme not in ("http", "https"):
            raise Refused(
                f"the URL {url[:80]!a} is neither a data URI nor http(s): files of the server are not read. Send the "
                "clip as input_audio."
            )
        return self._fetch(url)

    def _too_big(self, size: int) -> Refused:
        text = f"a clip has {size:,} bytes, at most {self.max_bytes:,} are taken. Send a shorter or a compressed one."
        return Refused(text, 413)

    def _fetch(self, url: str) -> bytes:
        asked = url
        opened: list[tuple[http.client.HTTPConnection, socket.socket]] = []

        def stop() -> None:  # whatever the other side does, the time is over
            late.set()
            for _, connected in opened:
                with suppress(OSError):  # it has hung up
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)

        late, timer = threading.Event(), threading.Timer(self.fetch_seconds, stop)
        timer.start()
        try:
            for _ in range(REDIRECTS + 1):
                connection = self._connect(url)
                connection.connect()
                opened.append((connection, connection.sock))  # which the connection forgets once it has the response
                if late.is_set():
                    break
                parts = urlsplit(url)
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"User-Agent": "dual-slm", "Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.getheader("Location") or "")
                    continue
                data = response.read(self.max_bytes + 1)
                if len(data) > self.max_bytes:
                    raise self._too_big(len(data))
                if response.status == 200 and not late.is_set():
                    return data
                break
        except Refused:
            raise
        except (OSError, http.client.HTTPException, ValueError):
            pass  # one answer for all that fails, so that nobody learns what is there
        finally:
            timer.cancel()
            for connection, _ in opened:
                connection.close()
        raise Refused(
            f"the audio at {asked[:80]!a} could not be fetched in {self.fetch_seconds:g} s and {REDIRECTS} redirects. "
            "Send the clip as input_audio."
        )

    def _connect(self, url: str) -> http.client.HTTPConnection:
        """A connection to an address that was checked: a name cannot resolve to another one afterwards."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host = port = None
        if not host or parts.scheme not in ("http", "https") or host not in self.hosts:
            raise Refused(
                f"audio is not fetched from {host or url[:80]!a}. Send the clip as input_audio, or ask the server's "
                "owner to allow that host (--allow-host).",
                403,
            )
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        if not all(ipaddress.ip_address(a).is_global or a in self.hosts for a in addresses):
            raise Refused(f"the host {host!a} has a private address, from which nothing is fetched.", 403)
        address, seconds = min(addresses), self.fetch_seconds
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        connection._create_connection = lambda place, *_: socket.create_connection((address, place[1]), seconds)  # pyright: ignore
        return connection

    def read_clip(self, data: bytes, rate: int) -> np.ndarray:
        """Mono samples at `rate` of an encoded clip.

        Raises:
            Refused: it is empty, no audio, or longer than `max_seconds`, whatever its header says.
        """
        import soundfile

        if not data:
            raise Refused("a clip has 0 bytes: the recording is empty.")
        if len(data) > self.max_bytes:
            raise self._too_big(len(data))
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                own, channels = file.samplerate, file.channels
                if own * channels > MAX_SAMPLES_PER_SECOND:
                    text = f"a clip has {channels} channels of {own:,} Hz, together at most {MAX_SAMPLES_PER_SECOND:,}"
                    raise Refused(f"{text} are taken. Resample it, or mix it to mono.")
                limit = int(self.max_seconds * own)
                samples = file.read(limit + 1, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            text = f"a clip of {len(data):,} bytes is not audio that libsndfile reads ({error.error_string.strip()})."
            raise Refused(f"{text} Send WAV, FLAC, Ogg or MP3.") from None
        if len(samples) > limit:
            text = f"a clip is longer than {self.max_seconds:g} s. Cut it, and send its parts as turns or requests."
            raise Refused(text, 413)
        try:
            return load_audio((samples, own), target_rate=rate)
        except ValueError as error:
            raise Refused(str(error)) from None
