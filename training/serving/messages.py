"""Chat messages as OpenAI's API has them -> turns whose clips have been heard."""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ...turns_dual_slm import SpokenTurn
from .ears import Ears, Heard
from .policy import Policy, Refused


class Strict(BaseModel):
    """Refuses unknown keys. A key that is null counts as left out, since clients send back what they received."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(Strict):
    type: Literal["text"]
    text: str


class SpokenPart(Strict):
    """The source of each branch, as in the processor: beside the clip, in the same part."""

    paralinguistic: Literal["speech", "caption", "none"] = "speech"
    linguistic: Literal["speech", "transcript", "none"] | None = None
    caption: str | None = None
    transcript: str | None = None


class InputAudio(Strict):
    data: str
    format: str | None = None  # the file's own header says it


class InputAudioPart(SpokenPart):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioURL(Strict):
    url: str


class AudioURLPart(SpokenPart):
    type: Literal["audio_url"]
    audio_url: AudioURL


Part = Annotated[TextPart | InputAudioPart | AudioURLPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)]
    name: str | None = None  # taken and not used
    annotations: list[Any] | None = Field(default=None, max_length=0)  # of a reply that is sent back


class ChatRequest(Strict):
    """The body of `/v1/chat/completions`. Without `temperature` and `top_p` the reply is greedy."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    stop: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    modalities: list[Literal["text"]] = ["text"]
    response_format: dict[Literal["type"], Literal["text"]] = {"type": "text"}
    user: str | None = None  # taken and not used

    @property
    def longest(self) -> int | None:
        """Tokens of the longest reply that was asked for."""
        return self.max_completion_tokens or self.max_tokens


@dataclass(frozen=True)
class HeardPart:
    """A spoken part: the source of each branch, and what was heard in the clip."""

    turn: SpokenTurn
    heard: Heard

    @property
    def branches(self) -> dict[str, bool]:
        """Which branches listen to the clip."""
        return {name: getattr(self.turn, name) == "speech" for name in ("paralinguistic", "linguistic")}


@dataclass(frozen=True)
class Turn:
    """A message whose clips have been heard."""

    role: str
    parts: list[str | HeardPart]


async def read_messages(messages: list[Message], policy: Policy, ears: Ears) -> list[Turn]:
    """Checks a conversation by the policy, and hears its clips, all at once.

    Raises:
        Refused: what the policy forbids, or a spoken part that the checkpoint cannot take.
    """
    parts = [part for message in messages for part in message.content]
    spoken = [part for part in parts if not isinstance(part, TextPart)]
    for name, count, limit in (
        ("messages", len(messages), policy.max_messages),
        ("clips", len(spoken), policy.max_clips),
        ("characters", sum(len(text) for part in parts for text in _texts(part)), policy.max_characters),
    ):
        if count > limit:
            raise Refused(
                f"the conversation has {count:,} {name}, at most {limit:,} are taken. Leave out its first turns."
            )
    if any(message.role != "user" and not isinstance(p, TextPart) for message in messages for p in message.content):
        raise Refused("audio stands in a message that is not the user's. Write what others say as text.")
    if not any(message.role == "user" for message in messages):
        raise Refused("no message is the user's: there is nothing to answer. Add one with the role 'user'.")
    for text in (text for part in parts for text in _texts(part)):
        policy.check_text(text, ears.processor.tokenizer)
    turns = [_spoken_turn(part, ears) for part in spoken]
    heard = await asyncio.gather(*(hear_clip(part, policy, ears) for part in spoken))
    told = iter([HeardPart(turn, each) for turn, each in zip(turns, heard, strict=True)])
    return [
        Turn(
            "system" if message.role == "developer" else message.role,
            [part.text if isinstance(part, TextPart) else next(told) for part in message.content],
        )
        for message in messages
    ]


async def hear_clip(clip: InputAudioPart | AudioURLPart | bytes, policy: Policy, ears: Ears) -> Heard:
    """Reads and decodes a clip on a thread, and waits for the ears."""
    rate = ears.processor.sampling_rate

    def read() -> Any:
        data = clip
        if isinstance(data, InputAudioPart):
            data = policy.read_base64(data.input_audio.data)
        elif isinstance(data, AudioURLPart):
            data = policy.read_url(data.audio_url.url)
        return policy.read_clip(data, rate)

    samples = await asyncio.get_running_loop().run_in_executor(None, read)
    return await asyncio.wrap_future(ears.submit(samples))


def _texts(part: TextPart | SpokenPart) -> list[str]:
    given = [part.text] if isinstance(part, TextPart) else [part.caption, part.transcript]
    return [text for text in given if text is not None]


def _spoken_turn(part: SpokenPart, ears: Ears) -> SpokenTurn:
    has_words = ears.processor.linguistic_adapter_type != "none"
    given = part.model_dump(include={"paralinguistic", "linguistic", "caption", "transcript"}, exclude_none=True)
    try:
        return SpokenTurn.from_part(given | {"audio": b""}, has_words)
    except ValueError as error:
        raise Refused(str(error)) from None
