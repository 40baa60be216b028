"""Corpora of their public sizes without their data: rows for a plan (`dual-slm train --dry-run`) before any table is made.

Sizes and typical lengths are those of the corpora's own descriptions; texts are filler, and a label is any of its classes.
A real table has its own lengths, and fewer rows where clips are missing. LibriSpeech and MELD have their official training
and validation splits. StyleTalk has its training split and no validation. DailyTalk is split as by our reader. TextrolSpeech
counts whole as training rows, as the paper's own split of it is not public; our reader keeps one speaker in ten out of them.
"""

from dataclasses import dataclass
from functools import cache

from ..labels import LEVELS
from ..text import split_by
from .row import Message, Row

_FILLER = "the quick brown fox jumps over the lazy dog and the slow red hen walks under the busy cat while " * 8
_SPREAD = (0.25, 0.5, 0.75, 1.0, 2.5)  # lengths of clips and texts over their mean
_EMOTIONS = ("neutral", "happy", "sad", "angry", "surprised", "fearful", "disgust")


@dataclass(frozen=True)
class _Corpus:
    train: int  # rows
    validation: int
    seconds: float  # mean of a clip
    letters: int  # mean of a transcript
    labels: tuple[str, ...] = ()  # attributes with classes of their own
    emotions: tuple[str | None, ...] = (None,)
    turns: int = 0  # of a dialogue: rows have from none to all but one of them as their history
    earlier: int = 0  # turns that every row has as its history
    response: int = 0  # letters of an answer


NOMINAL = {
    "librispeech": _Corpus(281_241, 2_703 + 2_864, 12.3, 184, ("gender",)),
    "textrolspeech": _Corpus(236_220, 0, 5.0, 60, tuple(LEVELS), (*_EMOTIONS, "contempt")),
    "meld": _Corpus(9_989, 1_109, 3.6, 40, emotions=_EMOTIONS, turns=10),
    "styletalk": _Corpus(
        *(1_838, 0, 3.5, 50, ("tempo", "energy")),
        emotions=("neutral", "friendly", "unfriendly", "cheerful", "sad"),
        earlier=3,
        response=75,
    ),
    # The rows of all splits: 2,541 dialogues, of 10 turns up to the 904th and then of 9.
    "dailytalk": _Corpus(23_773, 0, 3.3, 44, ("gender",), (*_EMOTIONS[1:4], None, None, None), response=44),
}
_DIALOGUES = 2_541  # of DailyTalk


def nominal_rows(corpus: str) -> list[Row]:
    """Rows of training and validation of a corpus in `NOMINAL`, with the labels, histories and answers of its reader."""
    size = NOMINAL[corpus]
    if corpus == "dailytalk":
        longer = size.train - 9 * _DIALOGUES  # dialogues that have a tenth turn
        places = [(d, turn, 9 + (d < longer)) for d in range(_DIALOGUES) for turn in range(9 + (d < longer))]
        rows = []
        for n, (dialogue, turn, turns) in enumerate(places):
            split, response = split_by(f"dailytalk/{dialogue}"), size.response if turn < turns - 1 else 0
            rows.append(_row(corpus, n, split, turn, response))
        return [row for row in rows if row.split != "test"]
    whole = size.train + size.validation
    earlier = [n % size.turns if size.turns else size.earlier for n in range(whole)]
    splits = ["train"] * size.train + ["validation"] * size.validation
    return [_row(corpus, n, splits[n], earlier[n], size.response) for n in range(whole)]


def _row(corpus: str, n: int, split: str, earlier: int, response: int) -> Row:
    size, spread = NOMINAL[corpus], _SPREAD[n % len(_SPREAD)]
    labels = {name: LEVELS[name][n % len(LEVELS[name])] for name in size.labels}
    return Row(
        f"{n}",
        corpus,
        split,
        audio=f"{corpus}/{n}.wav",
        duration=size.seconds * spread,
        transcript=_text(round(size.letters * spread)),
        emotion=size.emotions[n % len(size.emotions)],
        turn=earlier,
        history=_history(earlier, 71 if corpus == "styletalk" else size.letters),
        response=_text(response) if response else None,
        **labels,
    )


@cache
def _text(letters: int) -> str:
    return _FILLER[:letters].strip()


@cache
def _history(turns: int, letters: int) -> list[Message]:
    """Turns of both speakers in turn, of which the last is the assistant's."""
    roles = [("user", "assistant")[(turns - turn) % 2] for turn in range(turns)]
    return [{"role": role, "content": _text(letters)} for role in roles]
