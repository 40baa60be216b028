"""Servers of tiny checkpoints on loopback, by the real uvicorn."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import uvicorn

from conftest import tone
from dual_slm.training.serving.ears import Ears
from dual_slm.training.serving.engines import TransformersEngine
from dual_slm.training.serving.policy import Policy
from dual_slm.training.serving.server import Service


def wav(samples: np.ndarray | float, rate: int = 16_000, **options) -> bytes:
    """An encoded clip; a number is so many seconds of a tone."""
    file = io.BytesIO()
    soundfile.write(file, tone(samples, 1) if isinstance(samples, float) else samples, rate, format="WAV", **options)
    return file.getvalue()


def audio_part(data: bytes, **sources: str) -> dict:
    sound = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": sound, **sources}


def user(*parts: dict | str) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


@contextmanager
def running(app) -> Iterator[str]:
    """Serves an ASGI application; gives its address, without a slash at the end."""
    config = uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", timeout_graceful_shutdown=1_800)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 1_800
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def make_service(model, processor, policy: Policy | None = None, **options) -> Service:
    ears = Ears(model, processor)
    return Service("tiny", ears, TransformersEngine(ears), policy or Policy(), **options)
