"""The door of the server, as ASGI middleware: back-pressure, limits of size and time, clients that leave, and counts."""

import json
import time
from collections import Counter
from typing import Any

import anyio
from fastapi import HTTPException
from fastapi.responses import JSONResponse

from .policy import Refused

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in the shape of OpenAI's API."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Refused, **headers: str) -> JSONResponse:
    body = error_body(str(error), error.status, error.code, error.param)
    return JSONResponse(body, error.status, {name.replace("_", "-"): value for name, value in headers.items()})


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


class Metrics:
    """Counters and gauges in Prometheus' text format."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, **labels: Any) -> None:
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        self.values[f"dual_slm_{name}" + (f"{{{inner}}}" if inner else "")] += amount  # pyright: ignore

    def text(self) -> str:
        lines, typed = [], set()
        for name, value in sorted(self.values.items()):
            family = name.partition("{")[0]
            if family not in typed:
                lines.append(f"# TYPE {family} {'counter' if family.endswith('_total') else 'gauge'}")
                typed.add(family)
            lines.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return "\n".join(lines) + "\n"


class Gate:
    """Lets so many requests with a body in at once. Every one of them ends in an answer, or in an error.

    A request that comes when the server is full gets 429 before its body is read. One that takes too long gets 504,
    or an error as the last event of its stream. Work for a client that has left is cancelled.

    Args:
        app: the ASGI application.
        capacity: requests that run or wait.
        seconds: for one request, from its first byte to its last.
        max_bytes: of a body.
        paths: the known routes, for the labels of the metrics.
    """

    def __init__(self, app: Any, capacity: int, seconds: float, max_bytes: int, metrics: Metrics, paths: set[str]):
        self.app, self.capacity, self.seconds, self.max_bytes = app, capacity, seconds, max_bytes
        self.metrics, self.paths, self.inside = metrics, paths, 0
        self.usual_seconds = 1.0  # that a request takes, a moving average

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, status = time.perf_counter(), 499  # what nginx writes for a client that has left

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        refused = self._refuse(scope)
        if refused is not None:
            await error_response(refused, **self._retry_after(refused))(scope, receive, send)
            self.metrics.add("requests_total", path=path, status=refused.status)
        else:
            self.inside += 1
            try:
                await self._run(scope, receive, watched, lambda: status)
            except Exception:
                status = 500
                raise
            finally:
                self.inside -= 1
                took = time.perf_counter() - started
                self.usual_seconds += 0.1 * (took - self.usual_seconds)
                self.metrics.add("request_seconds_total", took, path=path)
                self.metrics.add("requests_total", path=path, status=status)

    def _refuse(self, scope: Any) -> Refused | None:
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if self.inside >= self.capacity:
            text = f"{self.inside} requests are waiting or running, which is all that is allowed. Try again later."
            return Refused(text, 429, code="rate_limit_exceeded")
        return self._too_big() if int(length) > self.max_bytes else None

    def _retry_after(self, refused: Refused) -> dict[str, str]:
        return {"Retry_After": str(round(self.usual_seconds) + 1)} if refused.status == 429 else {}

    def _too_big(self) -> Refused:
        return Refused(f"the request is larger than {self.max_bytes:,} bytes. Send shorter clips, or fewer.", 413)

    async def _run(self, scope: Any, receive: Any, send: Any, status: Any) -> None:
        complete, size = anyio.Event(), 0

        async def limited() -> Any:
            nonlocal size
            if complete.is_set():
                await anyio.sleep_forever()  # `watch` has an eye on the client
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                group.cancel_scope.cancel()
            elif size > self.max_bytes:
                raise HTTPException(413, str(self._too_big()))
            elif not message.get("more_body"):
                complete.set()
            return message

        async def watch() -> None:
            await complete.wait()
            await receive()  # only http.disconnect can come now
            group.cancel_scope.cancel()

        late = False
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            with anyio.move_on_after(self.seconds) as limit:
                await self.app(scope, limited, send)
            late = limit.cancelled_caught
            group.cancel_scope.cancel()
        if late:
            error = Refused(
                f"the request took longer than {self.seconds:g} s. Send a shorter one, or try again later.", 504
            )
            if status() == 499:
                await error_response(error)(scope, receive, send)
            else:
                last = event(error_body(str(error), 504)).encode()
                await send({"type": "http.response.body", "body": last, "more_body": False})
