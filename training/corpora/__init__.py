"""Corpora as tables of one row schema; README.md says what each corpus needs and how to add one."""

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .row import Row


class Corpus(NamedTuple):
    summary: str  # one line for the command line's help
    shares_speakers: bool = False  # the corpus's own splits share speakers, by design


# Each name is a module with `read(root, report, ...)`; its docstring names the source and the layout of the corpus.
CORPORA = {
    "librispeech": Corpus("read speech, transcripts (CC BY 4.0)"),
    "textrolspeech": Corpus("captions, gender, pitch, tempo, energy, emotion"),
    "meld": Corpus("television dialogue, 7 emotions; audio out of mp4 by ffmpeg", shares_speakers=True),
    "styletalk": Corpus("the same words in several styles, with what was said before (MIT)", shares_speakers=True),
    "dailytalk": Corpus("two-speaker dialogues, emotion (CC BY-SA 4.0)", shares_speakers=True),
    "ravdess": Corpus("two sentences in 8 emotions (CC BY-NC-SA 4.0)"),
    "cremad": Corpus("twelve sentences in 6 emotions (ODbL)"),
    "iemocap": Corpus("dyadic sessions, 4 emotions, five folds by session"),
    "folder": Corpus("your own: metadata.jsonl or metadata.csv beside audio files"),
}


def reader(name: str) -> Callable[..., Iterator[Row]]:
    """The `read` function of a corpus; an unknown name is a ValueError."""
    if name not in CORPORA:
        raise ValueError(f"no corpus of the name {name!r}; there are {', '.join(CORPORA)}.")
    return importlib.import_module(f".{name}", __name__).read
