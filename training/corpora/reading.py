"""What corpus readers share: CSV files, damaged encodings, and dialogues as chat messages."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .row import Message

_MARKS = str.maketrans({"’": "'", "‘": "'", "\u0092": "'", "\u0091": "'", "“": '"', "”": '"', "…": "...", "—": " - "})
_BROKEN_MARKS = {"â€™": "'", "â€˜": "'", "â€œ": '"', "â€\x9d": '"', "â€¦": "...", "â€”": " - "}
_SURROGATES = re.compile("[\udc80-\udcff]+")


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Records of a CSV file that has at least these columns. Every value is stripped text; "nan" is a word."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)}.")
        for record in reader:
            if None in record.values():
                raise ValueError(f"{path}, line {reader.line_num}: fewer fields than the header has. Is it cut off?")
            yield {name: decode(value).strip() for name, value in record.items() if name is not None}


def read_text(path: Path) -> str:
    """A text file in UTF-8, Windows-1252 or a mixture of both."""
    return decode(path.read_text(encoding="utf-8", errors="surrogateescape"))


def decode(text: str) -> str:
    """Replaces the surrogates of text that was read as UTF-8 with "surrogateescape": their bytes are Windows-1252."""
    return _SURROGATES.sub(lambda part: part[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace"), text)


def clean_text(text: str) -> str:
    """One line of text with plain quotation marks, also where a wrong encoding has damaged them (MELD)."""
    for broken, mark in _BROKEN_MARKS.items():
        text = text.replace(broken, mark)
    return " ".join(text.translate(_MARKS).split())


def messages(turns: Iterable[tuple[str, str]], speaker: str) -> list[Message]:
    """Earlier turns (speaker, text) as chat messages; `speaker` is the user. Turns of one role become one message."""
    groups = itertools.groupby(turns, key=lambda turn: "user" if turn[0] == speaker else "assistant")
    return [{"role": role, "content": "\n".join(text for _, text in group)} for role, group in groups]
