"""A spoken turn: what the content part of a chat message says about one clip, checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np

SOURCES = {"paralinguistic": ("speech", "caption", "none"), "linguistic": ("speech", "transcript", "none")}
AUDIO_MARK = "<|audio|>"  # stands for a clip in rendered text, until the processor writes its placeholders
_CLIP = ("audio", "path", "url")
_KNOWN = {"type", *_CLIP, "sampling_rate", "num_frames", "transcript", "caption", *SOURCES}


@dataclass
class SpokenTurn:
    """One clip of a conversation, and the source of each branch.

    Args:
        paralinguistic: `speech`, `caption` or `none`.
        linguistic: `speech`, `transcript` or `none`.
        caption, transcript: text that stands for a branch.
        clip: the audio as it was given.
        sampling_rate: rate of an array, in Hz.
        num_frames: encoder frames, known where training has cached the encoder's features.
        samples: mono samples at the model's rate, once they are loaded.
    """

    paralinguistic: str
    linguistic: str
    caption: str | None = None
    transcript: str | None = None
    clip: Any = None
    sampling_rate: int | None = None
    num_frames: int | None = None
    samples: np.ndarray | None = None

    @classmethod
    def from_part(cls, part: Any, has_words: bool = True) -> "SpokenTurn":
        """Reads a content part of type `audio`, or a bare clip.

        Args:
            has_words: whether the checkpoint has a linguistic adapter. Without one, the default linguistic source is
                the transcript if there is one, else `none`.

        Raises:
            ValueError: an unknown key or source, a source without its text, or not exactly one clip to hear.
        """
        bare = not isinstance(part, dict) or not part.keys().isdisjoint(("array", "raw", "bytes"))
        part = {"audio": part} if bare else {key: value for key, value in part.items() if not _is_empty(value)}
        unknown = set(part) - _KNOWN
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)} in a spoken turn; known are {sorted(_KNOWN)}.")
        words = "speech" if has_words else "transcript" if (part.get("transcript") or "").strip() else "none"
        sources: dict[str, Any] = {
            "paralinguistic": part.get("paralinguistic", "speech"),
            "linguistic": part.get("linguistic", words),
        }
        for branch, source in sources.items():
            if source not in SOURCES[branch]:
                raise ValueError(f"{branch} is {source!r}; it must be one of {', '.join(SOURCES[branch])}.")
            if branch == "linguistic" and source == "speech" and not has_words:
                raise ValueError(
                    "linguistic: speech needs a linguistic adapter, which this checkpoint has not: give a transcript."
                )
            if source in ("caption", "transcript"):
                text = part.get(source)
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{branch}: {source} needs the text {source!r} in the same spoken turn.")
        names = ("caption", "transcript", "sampling_rate", "num_frames")
        turn = cls(**sources, **{name: part.get(name) for name in names})
        if turn.hears and turn.num_frames is None:
            given = [part[key] for key in _CLIP if part.get(key) is not None]
            if len(given) != 1:
                cause = "" if given else ": None is what a microphone gives that recorded nothing"
                raise ValueError(
                    f"a spoken turn needs one of 'audio', 'path' and 'url', got {len(given)} of them{cause}."
                )
            turn.clip = given[0]
        return turn

    @property
    def hears(self) -> bool:
        """Whether a branch hears the clip."""
        return "speech" in (self.paralinguistic, self.linguistic)

    @property
    def texts(self) -> list[str]:
        """The texts that stand for a branch."""
        sources = (self.paralinguistic, self.linguistic)
        return [str(getattr(self, name)) for name in ("caption", "transcript") if name in sources]


def _is_empty(value: Any) -> bool:
    """Whether a value is only what Arrow puts into the fields that a row lacks."""
    return value is None or (isinstance(value, dict) and len(value) > 0 and all(v is None for v in value.values()))
