"""Files that survive a kill: a journal of finished work, and JSON that is there as a whole or not at all."""

import json
import os
from pathlib import Path


class Journal:
    """JSON values by key, appended to a file. A group that `add` writes is kept as a whole or, cut by a kill, in part
    up to its last whole line.

    Args:
        path: of the file; made when something is added.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.values: dict[str, object] = {}
        if not self.path.is_file():
            return
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for line in filter(None, whole.decode("utf-8").split("\n")):  # splitlines also splits at U+2028
            key, value = json.loads(line)
            self.values[key] = value
        if len(whole) < len(raw):  # the line that the kill cut
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def add(self, group: dict[str, object]) -> None:
        """Appends values and waits until they are on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in group.items())
        with open(self.path, "ab") as file:
            file.write(lines.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.values.update(group)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
