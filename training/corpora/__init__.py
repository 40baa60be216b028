"""Corpora as tables of one row schema."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus before it is read.

    Args:
        about: for the command line's help.
        shares_speakers: its own splits share speakers, by design.
    """

    about: str
    shares_speakers: bool = False


# Each name is a module here with `read(root, ...) -> rows`; its docstring says where the corpus is and how it lies.
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


def reader(name: str):
    """The `read` function of a corpus."""
    if name not in CORPORA:
        raise ValueError(f"no corpus of the name {name!r}; there are {', '.join(CORPORA)}.")
    return importlib.import_module(f".{name}", __name__).read
