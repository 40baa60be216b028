"""One's own corpus: a folder with `metadata.jsonl` or `metadata.csv` beside its audio files.

`file` (or `audio`, `path`) is relative to the folder, `text` (or `transcript`) is what is said. Other columns of a row are
taken as they are, unknown ones ignored. `split` is train, validation or test (default: train).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers.utils import logging

from ..files import write_text
from .checks import Report, check_rows
from .reading import decode, read_csv
from .row import COLUMNS, Row, make_row

logger = logging.get_logger(__name__)
_AUDIO, _TEXT = ("audio", "file", "path"), ("transcript", "text")


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of the metadata. A line without audio and text, or with a value that `make_row` refuses, is a ValueError."""
    table = next((root / name for name in ("metadata.jsonl", "metadata.csv") if (root / name).is_file()), None)
    if table is None:
        raise FileNotFoundError(f"{root} holds neither metadata.jsonl nor metadata.csv.")
    for number, record in _json_lines(table) if table.suffix == ".jsonl" else enumerate(read_csv(table, ()), 2):
        file = next((record[k] for k in _AUDIO if record.get(k)), None)
        text = next((record[k] for k in _TEXT if record.get(k)), None)
        if file is None and text is None:
            raise ValueError(f"{table}, line {number}: names no audio file ({', '.join(_AUDIO)}) and no text.")
        known = {k: v for k, v in record.items() if k in COLUMNS}
        known |= {"audio": None if file is None else str(root / file), "transcript": text}
        known |= {k: known.get(k) or v for k, v in {"corpus": root.name, "split": "train"}.items()}
        known["id"] = known.get("id") or f"{known['corpus']}/{file or number}"
        try:
            yield make_row(**known)
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(decode(line)) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if isinstance(record, dict):
                yield number, record
            elif line.strip():
                raise ValueError(f"{path}, line {number}: {line.strip()[:60]!r} is no JSON object.")


def read_folder(root: str | Path, allow_missing_audio: bool = False) -> list[Row]:
    """The checked rows of a folder. Rows that are left out are logged."""
    report = Report()
    rows = list(check_rows(read(Path(root), report), report, allow_missing_audio))
    if report:
        logger.warning(f"{root}: {report}")
    return rows


def write_metadata(records: Iterable[dict], root: Path) -> Path:
    """Writes the `metadata.jsonl` of a folder and returns its path."""
    path = root / "metadata.jsonl"
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
