"""One's own corpus: a folder with `metadata.jsonl` or `metadata.csv` beside its audio files.

`file` (or `audio`, `path`) is relative to the folder, `text` (or `transcript`) is what is said; any other column of the
schema is taken as it is, columns outside it are ignored. `split` is train, validation or test (default: train).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from .schema import FEATURES, Report, check_rows, decode, make_row, read_csv

logger = logging.get_logger(__name__)
_AUDIO, _TEXT = ("audio", "file", "path"), ("transcript", "text")


def read(root: Path, report: Report) -> Iterator[dict]:
    """Rows as the metadata says them.

    Raises:
        FileNotFoundError: neither `metadata.jsonl` nor `metadata.csv`.
        ValueError: a line is no JSON object, has neither audio nor text, or a value that the schema refuses.
    """
    tables = [root / name for name in ("metadata.jsonl", "metadata.csv") if (root / name).is_file()]
    if not tables:
        raise FileNotFoundError(f"{root} holds neither metadata.jsonl nor metadata.csv.")
    records = _json_lines(tables[0]) if tables[0].suffix == ".jsonl" else enumerate(read_csv(tables[0], ()), 2)
    for number, record in records:
        file = next((record[k] for k in _AUDIO if record.get(k)), None)
        text = next((record[k] for k in _TEXT if record.get(k)), None)
        if file is None and text is None:
            raise ValueError(f"{tables[0]}, line {number}: names no audio file ({', '.join(_AUDIO)}) and no text.")
        known = {k: v for k, v in record.items() if k in FEATURES}
        known |= {"audio": None if file is None else str(root / file), "transcript": text}
        known |= {k: known.get(k) or v for k, v in {"corpus": root.name, "split": "train"}.items()}
        known["id"] = known.get("id") or f"{known['corpus']}/{file or number}"
        try:
            yield make_row(**known)
        except ValueError as error:
            raise ValueError(f"{tables[0]}, line {number}: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(decode(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: {line.strip()[:60]!r} is no JSON object.")
            yield number, record


def read_folder(root: str | Path, allow_missing_audio: bool = False) -> list[dict]:
    """The checked rows of a folder; what was left out is logged."""
    report = Report()
    rows = list(check_rows(read(Path(root), report), report, allow_missing_audio))
    if report:
        logger.warning(f"{root}: {report}")
    return rows
