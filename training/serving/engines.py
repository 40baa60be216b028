"""What answers a conversation: the checkpoint's own LLM in this process, or any LLM behind an OpenAI API as text."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from ...conversation_dual_slm import StopOnEvent
from ...modeling_dual_slm import DualSLMAudioFeatures
from ..endpoint import read_endpoint
from .ears import Ears
from .messages import ChatRequest, HeardPart, Turn
from .policy import Refused

DEFAULT_LENGTH = 256  # tokens of a reply, where the request names none


@dataclass(frozen=True)
class Finish:
    """The end of a reply: OpenAI's `finish_reason`, and how many tokens were read and written."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Engine(Protocol):
    """Answers conversations."""

    def stream(self, turns: list[Turn], request: ChatRequest) -> AsyncGenerator[str | Finish, None]:
        """The reply piece by piece, then its [`Finish`]. Who closes the iterator stops the generation."""
        ...

    async def close(self) -> None:
        """Frees threads and connections."""
        ...


class TransformersEngine:
    """The checkpoint's LLM, by `generate`, one reply at a time.

    Args:
        ears: of the whole model.
    """

    def __init__(self, ears: Ears):
        self.model, self.processor = ears.model, ears.processor
        self._thread = ThreadPoolExecutor(1, "generation")

    async def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def stream(self, turns: list[Turn], request: ChatRequest) -> AsyncGenerator[str | Finish, None]:
        loop, left = asyncio.get_running_loop(), Event()
        pieces: asyncio.Queue[str | Future[Finish]] = asyncio.Queue()

        def send(piece: "str | Future[Finish]") -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        cut = StopText(request.stop)

        def write(text: str) -> None:
            send(cut.add(text))
            if cut.done:
                left.set()

        prompt, features = self._prompt(turns)
        future = self._thread.submit(self._generate, prompt, features, request, _Writer(self.processor, write), left)
        future.add_done_callback(send)
        try:
            while isinstance(piece := await pieces.get(), str):
                if piece:
                    yield piece
            finish = piece.result()
            if not cut.done and (rest := cut.rest()):
                yield rest
            yield Finish("stop", finish.prompt_tokens, finish.completion_tokens) if cut.done else finish
        finally:
            left.set()
            future.cancel()

    def _prompt(self, turns: list[Turn]) -> tuple[torch.Tensor, DualSLMAudioFeatures | None]:
        """Token ids with placeholders, (1, S), and the features of their clips."""
        messages, features = [], []
        for turn in turns:
            content: list[dict[str, Any]] = []
            for part in turn.parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                    continue
                spoken = part.turn
                names = ("paralinguistic", "linguistic", "caption", "transcript")
                sources = {name: getattr(spoken, name) for name in names if getattr(spoken, name) is not None}
                content.append({"type": "audio", "num_frames": part.heard.num_frames, **sources})
                if spoken.hears:
                    features.append(part.heard.select(**part.branches))
            messages.append({"role": turn.role, "content": content})
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        inputs: Any = self.processor.apply_chat_template(messages, **options)
        prompt = inputs["input_ids"].to(self.model.get_input_embeddings().weight.device)
        return prompt, DualSLMAudioFeatures.concatenate(features) if features else None

    def _generate(
        self,
        prompt: torch.Tensor,
        features: DualSLMAudioFeatures | None,
        request: ChatRequest,
        writer: "_Writer",
        left: Event,
    ) -> Finish:
        size = prompt.shape[1] - _count_unused(features)
        limit = self.model.config.get_text_config().max_position_embeddings
        longest = request.longest or min(DEFAULT_LENGTH, max(limit - size, 1))
        if size + longest > limit:
            raise Refused(
                f"the conversation has {size:,} tokens and the reply may have {longest:,}; the LLM takes {limit:,} "
                "together. Leave out its first turns, or lower max_tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        if request.seed is not None:
            torch.manual_seed(request.seed)
        output = self.model.generate(
            input_ids=prompt,
            audio_features=features,
            max_new_tokens=longest,
            streamer=writer,
            stopping_criteria=[StopOnEvent(left)],
            **_sampling(request),
        )
        ends = self.model.generation_config.eos_token_id
        ended = int(output[0, -1]) in (ends if isinstance(ends, list) else [ends])
        count = output.shape[1] - prompt.shape[1]
        return Finish("length" if count == longest and not ended else "stop", size, count)


def _count_unused(features: DualSLMAudioFeatures | None) -> int:
    """Placeholders that character CTC leaves empty."""
    slots, used = (features.linguistic_placeholders, features.linguistic_lengths) if features else (None, None)
    return 0 if slots is None or used is None else int(slots.sum() - used.sum())


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """The request's options of generation, as `generate` names them."""
    temperature = request.temperature if request.temperature is not None else float(request.top_p is not None)
    options: dict[str, Any] = {"do_sample": temperature > 0.01}  # logits divided by less overflow
    if options["do_sample"]:
        options |= {"temperature": temperature, "top_p": request.top_p or 1.0, "top_k": 0}
    if request.frequency_penalty or request.presence_penalty:
        penalties = Penalties(request.frequency_penalty, request.presence_penalty)
        options["logits_processor"] = LogitsProcessorList([penalties])
    return options


class _Writer(TextStreamer):
    """Hands over the text of new tokens, in pieces that later tokens do not change."""

    def __init__(self, processor: Any, write: Any):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class Penalties(LogitsProcessor):
    """OpenAI's penalties on the tokens of the reply so far: `frequency` for each time, `presence` once."""

    def __init__(self, frequency: float, presence: float):
        self.frequency, self.presence = frequency, presence
        self.start: int | None = None  # length of the prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        said = input_ids[:, self.start :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class StopText:
    """Cuts a streamed text before the first of several stop strings, and keeps back what may begin one.

    White space at either end of the whole text is left out, as `DualSLMConversation` does.
    """

    def __init__(self, stops: list[str]):
        self.stops = [stop for stop in stops if stop]
        self.kept, self.begun, self.done = "", False, False

    def add(self, text: str) -> str:
        """The part of the text that is certain by now."""
        if self.done:
            return ""
        self.kept += text
        if not self.begun:
            self.kept = self.kept.lstrip()
        found = [place for stop in self.stops if (place := self.kept.find(stop)) >= 0]
        if found:
            self.done = True
            certain = self.kept[: min(found)].rstrip()
        else:
            ends = [n for stop in self.stops for n in range(1, len(stop)) if self.kept.endswith(stop[:n])]
            certain = self.kept[: len(self.kept) - max(ends, default=0)].rstrip()
        self.kept = self.kept[len(certain) :]
        self.begun = self.begun or bool(certain)
        return certain

    def rest(self) -> str:
        """What was kept back, at the end of the text."""
        return self.kept.rstrip()


class TextEngine:
    """Any LLM behind an OpenAI API. It reads the words and a caption of the voice as text.

    The environment variable OPENAI_API_KEY holds the key.

    Args:
        url: `http://host:port/v1#model`, as for judges.
        timeout: of one request, in seconds.

    Raises:
        ValueError: the URL names no model.
    """

    def __init__(self, url: str, timeout: float = 120.0):
        import openai

        base, self.model, key = read_endpoint(url)
        self.client = openai.AsyncOpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=0)

    async def close(self) -> None:
        await self.client.close()

    async def stream(self, turns: list[Turn], request: ChatRequest) -> AsyncGenerator[str | Finish, None]:
        import openai

        messages: Any = [{"role": turn.role, "content": _as_text(turn)} for turn in turns]
        names = {"temperature", "top_p", "frequency_penalty", "presence_penalty", "stop", "seed"}
        options = request.model_dump(include=names, exclude_unset=True, exclude_none=True)
        options |= {"max_tokens": request.longest or DEFAULT_LENGTH, "stream_options": {"include_usage": True}}
        reason = usage = None
        try:
            chunks = await self.client.chat.completions.create(
                model=self.model, messages=messages, stream=True, **options
            )
            async with chunks:
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices[:1]:
                        reason = choice.finish_reason or reason
                        if choice.delta.content:
                            yield choice.delta.content
        except openai.APIStatusError as error:
            status = error.status_code if error.status_code in (400, 413, 422, 429) else 502
            raise Refused(f"the LLM {self.model} refuses: {error.message}", status, code="upstream") from None
        except openai.APIError as error:
            raise Refused(f"the LLM {self.model} does not answer: {error.message}", 502, code="upstream") from None
        if reason is None:
            raise Refused(f"the LLM {self.model} broke off in the middle of its reply. Send the request again.", 502)
        yield Finish(reason, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)


def _as_text(turn: Turn) -> str:
    return "\n".join(part if isinstance(part, str) else describe(part) for part in turn.parts)


def describe(part: HeardPart) -> str:
    """A spoken part as text: what is certain about the voice, then the words."""
    turn, listens = part.turn, part.branches
    voice = (turn.caption or "").strip() if turn.paralinguistic == "caption" else ""
    labels = part.heard.labels()
    if listens["paralinguistic"] and labels:
        voice = "(the speaker's voice: " + ", ".join(f"{name} {label}" for name, label in labels.items()) + ")"
    words = (turn.transcript or "").strip() if turn.linguistic == "transcript" else ""
    if listens["linguistic"]:
        words = part.heard.words or "(no words were heard)"
    return " ".join(filter(None, (voice, words)))
