"""Files that survive a kill, and where the package's own data files are. Imports neither torch nor transformers."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
RECIPES = Path(__file__).parent / "recipes"
# A LibriSpeech clip (CC BY 4.0, see assets/README.md): the input of the demo, and the check of a converted Whisper.
DEMO_CLIP = ASSETS / "librispeech-2764-36616-0000.flac"
DEMO_TRANSCRIPT = ASSETS / "librispeech-2764-36616-0000.txt"


@contextmanager
def atomic(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """A scratch path beside `path` to write a file or a folder to. It replaces `path` when the block ends.

    An error in the block removes the scratch path and leaves `path` as it was. A kill may leave the scratch path; the
    next attempt overwrites it.

    Args:
        suffix: of the scratch path. Where several processes may write the same path, it needs the process id.

    Raises:
        OSError: `path` is a folder that is not empty, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + suffix)
    shutil.rmtree(scratch, ignore_errors=True)  # does nothing to a file
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes text atomically, in UTF-8."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def replace_section(text: str, marks: tuple[str, str], body: str, title: str) -> str:
    """The text with `body` between two marks. A text without the marks gets them under a new heading at its end."""
    (start, end), section = marks, "\n".join([marks[0], body, marks[1]])
    if start in text and end in text:
        return text[: text.index(start)] + section + text[text.index(end) + len(end) :]
    return f"{text.rstrip()}\n\n## {title}\n\n{section}\n"


def read_lines(files: Iterable[str | Path]) -> list[str]:
    """The lines of text files, one file after another."""
    return [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]


class Journal:
    """JSON values by key, appended to a file. After a kill it holds every value up to the last whole line.

    It is our own because a database would be no text that a reader can open, and a log library reads nothing back.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        raw = self.path.read_bytes() if self.path.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = filter(None, whole.decode("utf-8").split("\n"))  # splitlines also splits at U+2028
        self.values: dict[str, Any] = dict(map(json.loads, lines))
        if len(whole) < len(raw):  # a kill cut the last line
            os.truncate(self.path, len(whole))

    def add(self, group: dict[str, Any]) -> None:
        """Appends values, and returns when they are on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in group.items())
        with open(self.path, "ab") as file:
            file.write(lines.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.values.update(group)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
