"""The routes of an OpenAI-compatible server."""

import reprlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.utils import logging

from .ears import Ears, Heard
from .engines import Engine, Finish
from .gate import Gate, Metrics, error_body, error_response, event
from .messages import ChatRequest, hear_clip, read_messages
from .policy import Policy, Refused

logger = logging.get_logger(__name__)


@dataclass
class Service:
    """What the routes work with.

    Args:
        name: of the model, as `/v1/models` lists it.
        capacity: requests that run or wait; more get 429.
        seconds: for one request.
    """

    name: str
    ears: Ears
    engine: Engine
    policy: Policy = field(default_factory=Policy)
    capacity: int = 32
    seconds: float = 120.0
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            text = f"the model {name!a} is not served here. Ask for {self.name!r}, which /v1/models lists."
            raise Refused(text, 404, code="model_not_found", param="model")

    async def hear(self, file: UploadFile) -> Heard:
        """What is heard in an uploaded file."""
        return await hear_clip(await file.read(), self.policy, self.ears)

    async def reply(self, request: ChatRequest) -> AsyncGenerator[str | Finish, None]:
        """A reply by the engine, counted."""
        turns = await read_messages(request.messages, self.policy, self.ears)
        async with aclosing(self.engine.stream(turns, request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finish):
                    self.metrics.add("prompt_tokens_total", piece.prompt_tokens)
                    self.metrics.add("completion_tokens_total", piece.completion_tokens)
                yield piece


def make_app(service: Service) -> FastAPI:
    """The ASGI application. At its shutdown the ears and the engine are closed."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.engine.close()
        service.ears.close()

    app = FastAPI(title="dual-slm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refused, lambda _, error: error_response(error))  # pyright: ignore
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    _add_information(app, service)
    _add_hearing(app, service)
    _add_chat(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(
        Gate, service.capacity, service.seconds, service.policy.max_request_bytes, service.metrics, paths
    )
    return app


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "dual-slm"}
        return {"object": "list", "data": [model]}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        ears = service.ears
        gauges = {"ears_cache_hits_total": ears.hits, "ears_cache_misses_total": ears.misses}
        for name, value in (gauges | {"ears_cache_bytes": ears.cached_bytes}).items():
            service.metrics.values[f"dual_slm_{name}"] = value
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_hearing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
    ) -> Any:
        service.check_model(model)
        unknown = set(await request.form()) - {"file", "model", "response_format"}
        if unknown or response_format not in ("json", "text"):
            given = ascii(sorted(unknown)[0] if unknown else response_format)
            raise Refused(f"{given} is not supported: send file, model, and response_format json or text.")
        words = (await service.hear(file)).words
        if words is None:
            raise Refused(f"{service.name} writes no words: it has no character CTC. Ask it in a chat.")
        return PlainTextResponse(words) if response_format == "text" else {"text": words}

    @app.post("/v1/audio/hear")
    async def hear(file: Annotated[UploadFile, File()], model: Annotated[str | None, Form()] = None) -> dict[str, Any]:
        service.check_model(model)
        heard = await service.hear(file)
        if heard.words is None and heard.attributes is None:
            raise Refused(f"{service.name} hears only by its LLM. Ask it in a chat.")
        return heard.to_dict() | {"duration": round(heard.seconds, 3)}


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Any:
        service.check_model(request.model)
        named = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        pieces = service.reply(request)
        if request.stream:
            first = await anext(pieces)  # what is refused, is refused with its status
            usage = request.stream_options.get("include_usage", False)
            body = _events(first, pieces, named | {"object": "chat.completion.chunk"}, usage)
            return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, finish = "", Finish("stop", 0, 0)
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Finish):
                    finish = piece
                else:
                    text += piece
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.reason}
        return named | {"object": "chat.completion", "choices": [choice], "usage": _usage(finish)}


async def _events(
    first: str | Finish, pieces: AsyncGenerator[str | Finish, None], named: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """A reply as server-sent events. An error after the first piece is the last event."""

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(named | {"choices": [choice]})

    async def all_pieces() -> AsyncGenerator[str | Finish, None]:
        yield first
        async for piece in pieces:
            yield piece

    async with aclosing(pieces):
        yield chunk({"role": "assistant", "content": ""})
        try:
            async for piece in all_pieces():
                if isinstance(piece, str):
                    yield chunk({"content": piece})
                    continue
                yield chunk({}, piece.reason)
                if with_usage:
                    yield event(named | {"choices": [], "usage": _usage(piece)})
        except Refused as error:
            yield event(error_body(str(error), error.status, error.code, error.param))
        except Exception:
            logger.exception("a stream failed")
            yield event(error_body(FAILED, 500))
    yield "data: [DONE]\n\n"


def _usage(finish: Finish) -> dict[str, int]:
    read, written = finish.prompt_tokens, finish.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# ---- errors

FAILED = "the server failed, and has written down why. Send the request again, or tell the server's owner."


async def _http_error(request: Request, error: Any) -> JSONResponse:
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path!a} is no route of this server. /v1/chat/completions is one."
    return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    """The first fault of a body: its place, what is wrong, and the value."""
    fault = error.errors()[0]
    place = ".".join(str(part)[:40] for part in fault["loc"][1:])
    value = reprlib.repr(fault.get("input"))
    message = f"{place or 'the body'}: {fault['msg'][:200]}, got {value}. Correct it, or leave it out."
    message = message.encode("ascii", "backslashreplace").decode()
    return JSONResponse(error_body(message, 400, param=ascii(place)[1:-1] or None), 400)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(FAILED, 500), 500)
