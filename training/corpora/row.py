"""One row schema for every corpus. A value that is not known is None, never a guess."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

from ..labels import ATTRIBUTES, EMOTIONS, LEVELS, SPLITS

Message = dict[str, str]  # a chat message: role and content


@dataclass(frozen=True)
class Variant:
    """How a row's clip is changed before it is encoded."""

    copy: int | None = None  # number of an augmented copy and seed of its draws; None: the clip as recorded
    revoiced: bool = False  # the copy is in another voice instead of at another speed
    loudness: float | None = None  # mean RMS (full scale 1) that the clip is brought to

    def digest_suffix(self, row_id: str) -> str:
        """Identifies the features of the clip, beside the content of its file. A copy is drawn by the row's id."""
        suffix = "" if self.loudness is None else f"/loudness {self.loudness}"
        if self.copy is None:
            return suffix
        return f"{suffix}/{row_id}/{self.copy}{'/voice' if self.revoiced else ''}"


@dataclass(frozen=True)
class Row:
    """One utterance of a corpus; all fields but `variant` are columns of a table."""

    id: str  # unique within the corpus
    corpus: str
    split: str  # train | validation | test
    audio: str | None = None  # path of the audio file
    duration: float | None = None  # seconds
    transcript: str | None = None
    caption: str | None = None  # how it is said, in words
    speaker: str | None = None
    gender: str | None = None
    pitch: str | None = None
    tempo: str | None = None
    energy: str | None = None
    emotion: str | None = None
    pitch_hz: float | None = None  # measured by `corpus label`: mean F0 of voiced frames
    energy_rms: float | None = None  # mean RMS, full scale 1
    seconds_per_word: float | None = None  # without leading and trailing silence
    dialogue: str | None = None  # dialogue that the row is a turn of
    turn: int | None = None  # position in the dialogue, from 0
    history: list[Message] = field(default_factory=list)  # earlier turns; the row's own speaker is the user
    system: str | None = None  # system prompt that `response` answers under
    response: str | None = None
    response_complete: bool | None = None  # False: cut by a length limit, so no end of turn is trained
    voice_only: bool | None = None  # True: the words are given as text, the audio lends only its voice
    subset: str | None = None  # the corpus's own name of a part, such as test-clean
    variant: Variant = Variant()

    @property
    def key(self) -> tuple[str, str]:  # among all tables
        return self.corpus, self.id

    @property
    def clip(self) -> tuple[str, str, int | None]:  # among all augmented copies
        return self.corpus, self.id, self.variant.copy

    def label(self, name: str) -> str | None:
        """Label of an attribute; None for any other task."""
        return getattr(self, name) if name in ATTRIBUTES else None

    def replace(self, **changes: Any) -> "Row":
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The row's columns in the order of the table."""
        return {name: getattr(self, name) for name in COLUMNS}


# The type of each column without None: the first argument of `str | None`.
_TYPES = {name: (*get_args(hint), hint)[0] for name, hint in get_type_hints(Row).items() if name != "variant"}
COLUMNS: dict[str, type] = _TYPES | {"history": list}


def make_row(**known: Any) -> Row:
    """Row of checked values. Empty strings become None, synonyms of an emotion its usual name.

    Unknown columns, and values of another type or class, are a ValueError, and so is a row without id, corpus or split.
    """
    if unknown := set(known) - set(COLUMNS):
        raise ValueError(f"unknown columns {sorted(unknown)}; a row has {', '.join(COLUMNS)}.")
    row = {name: value for name, value in known.items() if value not in ("", None)}
    for column in ("id", "corpus", "split"):
        if column not in row:
            raise ValueError(f"a row needs {column}; it has { ({k: v for k, v in row.items() if v}) }.")
    if "emotion" in row:
        row["emotion"] = EMOTIONS.get(row["emotion"], row["emotion"])
    for column, value in row.items():
        row[column] = _checked(column, value, row["id"])
    for column, classes in (LEVELS | {"split": SPLITS}).items():
        if column in row and row[column] not in classes:
            raise ValueError(f"{row['id']}: {column} is {row[column]!r}; it must be one of {', '.join(classes)}.")
    return Row(**row)


def _checked(column: str, value: Any, row_id: str) -> Any:
    """The value in the type of its column."""
    kind = COLUMNS[column]
    if kind is list:
        needed = "a list of {role, content}"
        if isinstance(value, list) and all(isinstance(t, dict) and set(t) == {"role", "content"} for t in value):
            return value
    elif kind is bool:
        needed = "true or false"
        if isinstance(value, str):  # every value of a CSV file is text
            value = {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, bool):
            return value
    else:
        needed = "a number"
        with suppress(TypeError, ValueError):
            return kind(value)
    raise ValueError(f"{row_id}: {column} is {value!r}; it must be {needed}.")
