"""One row schema for every corpus, and the reader for a plain folder of audio with a `metadata.jsonl`.

A row is a plain dict with the keys of `COLUMNS`. What is not known is `None`, never a guess.
"""

import json
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

COLUMNS = (
    "id",  # unique within the corpus
    "corpus",
    "split",  # train | validation | test
    "audio",  # path of the audio file
    "transcript",
    "caption",  # how it is said, in words
    "speaker",
    "gender",  # female | male
    "pitch",  # low | normal | high
    "tempo",  # slow | normal | fast
    "energy",  # low | normal | high
    "emotion",
    "history",  # earlier turns as chat messages
    "response",
)
SPLITS = ("train", "validation", "test")
_AUDIO_KEYS, _TEXT_KEYS = ("audio", "file", "path"), ("transcript", "text")


def _first(record: dict, keys: tuple[str, ...]):
    return next((record[key] for key in keys if record.get(key) is not None), None)


def read_folder(root: str | Path, allow_missing_audio: bool = False) -> list[dict]:
    """Reads `root/metadata.jsonl`, one JSON object a line, into rows.

    `file` (or `audio`) is relative to `root`, `text` (or `transcript`) is what is said; every other key of the schema is
    taken as it is, keys outside the schema are ignored.

    Raises:
        FileNotFoundError: no `metadata.jsonl`, or audio files are missing and `allow_missing_audio` is false.
        ValueError: a line is no JSON object, names no audio file, repeats an id, or has a split other than
            train, validation or test.
    """
    root = Path(root)
    table = root / "metadata.jsonl"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table} does not exist: a corpus folder holds metadata.jsonl beside its audio files."
        )
    rows, missing, seen = [], [], set()
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}, line {number}: not JSON ({error}).") from None
        file = _first(record, _AUDIO_KEYS)
        if file is None:
            raise ValueError(f"{table}, line {number}: names no audio file (one of {', '.join(_AUDIO_KEYS)}).")
        row = {column: record.get(column) for column in COLUMNS}
        row["id"] = record.get("id") or f"{root.name}/{file}"
        row["corpus"] = record.get("corpus") or root.name
        row["audio"] = str(root / file)
        row["transcript"] = _first(record, _TEXT_KEYS)
        if row["split"] not in SPLITS:
            raise ValueError(
                f"{table}, line {number}: split is {row['split']!r}; it must be one of {', '.join(SPLITS)}."
            )
        if row["id"] in seen:
            raise ValueError(f"{table}, line {number}: the id {row['id']!r} was used before.")
        seen.add(row["id"])
        if not Path(row["audio"]).is_file():
            missing.append(row["audio"])
            if allow_missing_audio:
                row["audio"] = None
        rows.append(row)
    if missing:
        message = f"{table}: {len(missing)} of {len(rows)} audio files are missing, the first is {missing[0]}."
        if not allow_missing_audio:
            raise FileNotFoundError(message + " Restore them, or pass allow_missing_audio to keep text-only rows.")
        logger.warning(message)
    return rows
