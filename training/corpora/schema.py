"""One row schema for every corpus, and tables of such rows as Parquet files, audio by reference.

What is not known is null, never a guess. A table appears complete or not at all.
"""

import csv
import errno
import hashlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import soundfile
from datasets import Features, Value
from datasets.arrow_writer import ParquetWriter
from tqdm import tqdm

SPLITS = ("train", "validation", "test")
LEVELS = {
    "gender": ("female", "male"),
    "pitch": ("low", "normal", "high"),
    "tempo": ("slow", "normal", "fast"),
    "energy": ("low", "normal", "high"),
}
_TEXT, _NUMBER = Value("string"), Value("float32")
FEATURES = Features(
    {
        "id": _TEXT,  # unique within the corpus
        "corpus": _TEXT,
        "split": _TEXT,  # train | validation | test
        "audio": _TEXT,  # path of the audio file
        "duration": _NUMBER,  # seconds
        "transcript": _TEXT,
        "caption": _TEXT,  # how it is said, in words
        "speaker": _TEXT,
        "gender": _TEXT,
        "pitch": _TEXT,
        "tempo": _TEXT,
        "energy": _TEXT,
        "emotion": _TEXT,
        "pitch_hz": _NUMBER,  # measured by `corpus label`: mean F0 of voiced frames
        "energy_rms": _NUMBER,  # mean RMS, full scale 1
        "seconds_per_word": _NUMBER,  # silence trimmed
        "dialogue": _TEXT,  # dialogue that the row is a turn of
        "turn": Value("int32"),  # place in it, from 0
        "history": [
            {"role": _TEXT, "content": _TEXT}
        ],  # earlier turns as chat messages; the speaker of the row is "user"
        "system": _TEXT,  # system prompt that `response` answers under
        "response": _TEXT,
        "response_complete": Value("bool"),  # false: cut by a length limit, so no end of turn is trained
        "voice_only": Value("bool"),  # true: the audio lends its voice to other words, given as text
    }
)
_KINDS = {
    column: {"string": str, "float32": float, "int32": int}[value.dtype]
    for column, value in FEATURES.items()
    if isinstance(value, Value) and value.dtype != "bool"
}
_TURN = {"role", "content"}
# One name for each emotion, whatever a corpus calls it; others are kept as they are.
EMOTIONS = {
    "happiness": "happy",
    "joy": "happy",
    "sadness": "sad",
    "anger": "angry",
    "fear": "fearful",
    "disgusted": "disgust",
    "surprise": "surprised",
}
VIDEO = {".mp4", ".mkv", ".avi", ".mov", ".webm"}


def make_row(**known) -> dict:
    """A row with null where nothing is known.

    Raises:
        ValueError: a key outside the schema, a split, gender, pitch, tempo or energy that is none of its classes, a
            number or a history that is none, or no id, corpus or split.
    """
    unknown = set(known) - set(FEATURES)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; a row has {', '.join(FEATURES)}.")
    row = dict.fromkeys(FEATURES) | {k: v for k, v in known.items() if v not in ("", None)}
    row["emotion"] = EMOTIONS.get(row["emotion"], row["emotion"])
    row["history"] = row["history"] or []
    for column in ("id", "corpus", "split"):
        if row[column] is None:
            raise ValueError(f"a row needs {column}; it has { ({k: v for k, v in row.items() if v}) }.")
    try:
        for column, kind in _KINDS.items():
            row[column] = None if row[column] is None else kind(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{row['id']}: {column} is {row[column]!r}; it must be a number.") from None
    for column in ("response_complete", "voice_only"):
        if isinstance(row[column], str):  # a CSV file knows text alone
            row[column] = {"true": True, "false": False}.get(row[column].lower(), row[column])
        if not isinstance(row[column], bool | None):
            raise ValueError(f"{row['id']}: {column} is {row[column]!r}; it must be true or false.")
    if not isinstance(row["history"], list) or any(not isinstance(t, dict) or set(t) != _TURN for t in row["history"]):
        raise ValueError(f"{row['id']}: history is {row['history']!r}; it must be a list of {{role, content}}.")
    for column, classes in (LEVELS | {"split": SPLITS}).items():
        if row[column] is not None and row[column] not in classes:
            raise ValueError(f"{row['id']}: {column} is {row[column]!r}; it must be one of {', '.join(classes)}.")
    return row


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Records of a CSV file with at least these columns; every value is text ("nan" is a word), stripped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a record has fewer fields than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or [])}.")
        for record in reader:
            if None in record.values():
                raise ValueError(f"{path}, line {reader.line_num}: fewer fields than the header has. Is it cut off?")
            yield {k: decode(v).strip() for k, v in record.items() if k is not None}


def decode(text: str) -> str:
    """Text that was read as UTF-8 with "surrogateescape": what was no UTF-8 is taken as Windows-1252."""
    return re.sub(
        "[\udc80-\udcff]+", lambda part: part[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace"), text
    )


_MARKS = str.maketrans({"’": "'", "‘": "'", "\u0092": "'", "\u0091": "'", "“": '"', "”": '"', "…": "...", "—": " - "})


def clean_text(text: str) -> str:
    """One line of text with plain quotation marks, whatever encoding damaged them (MELD)."""
    for broken, mark in {"â€™": "'", "â€˜": "'", "â€œ": '"', "â€\x9d": '"', "â€¦": "...", "â€”": " - "}.items():
        text = text.replace(broken, mark)
    return " ".join(text.translate(_MARKS).split())


def messages(turns: Iterable[tuple[str, str]], speaker: str) -> list[dict[str, str]]:
    """(speaker, text) of earlier turns -> chat messages from the side of `speaker`, who is the user; turns in a row of
    the same side become one."""
    result = []
    for who, text in turns:
        role = "user" if who == speaker else "assistant"
        if result and result[-1]["role"] == role:
            result[-1]["content"] += "\n" + text
        else:
            result.append({"role": role, "content": text})
    return result


def share(key: str, seed: int = 0) -> float:
    """A number in [0, 1) that is a function of (seed, key) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") / 2**64


def split_by(key: str, seed: int = 0, validation: float = 0.05, test: float = 0.05) -> str:
    """Split of a speaker or a dialogue, where a corpus has none of its own: the same whatever else is in the table."""
    draw = share(key, seed)
    return "test" if draw < test else "validation" if draw < test + validation else "train"


def cross_validated(rows: Iterable[dict], folds: int) -> Iterator[list[dict]]:
    """The rows of each fold of a cross-validation over the speakers who are not the test: dealt out by gender, those of a
    fold are its test, every second one of the next fold its validation, the others are trained on.

    Raises:
        ValueError: a row has no speaker, or there are too few of them.
    """
    rows = [row for row in rows if row["split"] != "test"]
    nameless = next((row["id"] for row in rows if row["speaker"] is None), None)
    if nameless is not None:
        raise ValueError(f"{nameless} has no speaker: folds are by speaker.")
    genders = {row["speaker"]: row["gender"] or "" for row in rows}
    speakers = sorted(genders, key=lambda speaker: (genders[speaker], speaker))
    if folds < 3 or len(speakers) < folds:
        raise ValueError(
            f"{folds} folds of {len(speakers)} speakers: it takes 3 folds (test, validation, the rest) and a speaker in each."
        )
    parts = [speakers[n::folds] for n in range(folds)]
    for n, part in enumerate(parts):
        splits = dict.fromkeys(parts[(n + 1) % folds][::2], "validation") | dict.fromkeys(part, "test")
        yield [row | {"split": splits.get(row["speaker"], "train")} for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# From what a corpus says to what is there
# --------------------------------------------------------------------------------------------------------------------


class Report(Counter):
    """What was found on the way: counts by kind, and the first example of each."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, kind: str, example: str) -> None:
        self[kind] += 1
        self.first.setdefault(kind, example)

    def __str__(self) -> str:
        return "\n".join(f"{count:,} x {kind}; the first: {self.first[kind]}" for kind, count in self.items())


def check_rows(
    rows: Iterable[dict], report: Report, allow_missing_audio: bool = False, audio_folder: Path | None = None
) -> Iterator[dict]:
    """Rows as they can be used: audio exists and has a readable header, `duration` is known, ids are unique.

    A row whose audio is missing or damaged is left out and counted; with `allow_missing_audio` it is kept as text. A
    repeated id is left out and counted. Audio inside video goes through ffmpeg into `audio_folder`, where it stays.

    Raises:
        FileNotFoundError: every audio file is missing.
        ValueError: rows were left out, and none is left.
    """
    seen, kept, lost = set(), 0, 0

    def inspect(row: dict) -> tuple[dict, str | None]:
        if row["audio"] is None:
            return row, None
        try:
            if Path(row["audio"]).suffix.lower() in VIDEO:
                if not Path(row["audio"]).is_file():
                    return row, "missing"
                row = row | {"audio": str(_extract(Path(row["audio"]), audio_folder, row["id"]))}
            info = soundfile.info(row["audio"])
        except soundfile.LibsndfileError:
            return row, "damaged" if Path(row["audio"]).is_file() else "missing"
        except subprocess.CalledProcessError:
            return row, "damaged"
        if info.frames == 0:
            return row, "damaged"
        return row | {"duration": info.frames / info.samplerate}, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, fault in _ordered_map(pool, inspect, rows):
            if row["id"] in seen:
                report.add("repeated id, left out", row["id"])
                continue
            seen.add(row["id"])
            if fault is not None:
                lost += fault == "missing"
                if not allow_missing_audio:
                    report.add(f"{fault} audio, left out (--allow-missing-audio keeps the text)", row["audio"])
                    continue
                report.add(f"{fault} audio, kept as text", row["audio"])
                row = row | {"audio": None}
            kept += 1
            yield row
    if lost and not kept:
        example = next(example for kind, example in report.first.items() if kind.startswith("missing"))
        raise FileNotFoundError(
            f"none of the {lost:,} audio files is there; the first is {example}. Is it the corpus's root that was "
            "given? `--allow-missing-audio` keeps the text alone."
        )
    if report and not kept:
        raise ValueError(f"no row is left. {report}")


def _ordered_map(pool: ThreadPoolExecutor, function, items: Iterable, ahead: int = 256) -> Iterator:
    """`map` that looks only so far ahead: memory stays flat."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _extract(video: Path, folder: Path | None, name: str) -> Path:
    """The sound of a video as 16 kHz mono FLAC; a file that is there is not made again."""
    if folder is None:
        raise ValueError(f"{video} is a video: say where its sound is to be kept.")
    target = folder / f"{name}.flac"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".part")
        command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(video), "-vn", "-ac", "1", "-ar", "16000"]
        try:
            done = subprocess.run([*command, "-f", "flac", str(scratch)], capture_output=True)
        except FileNotFoundError:
            raise FileNotFoundError("ffmpeg is missing: `apt-get install ffmpeg` (or brew, conda, winget).") from None
        # ffmpeg 5 ends with status 0 even where it could not write the end of the file.
        unwritten = b"Error writing trailer" in done.stderr or b"Error closing file" in done.stderr
        if done.returncode or unwritten:
            scratch.unlink(missing_ok=True)
        if b"No space left" in done.stderr:
            raise OSError(errno.ENOSPC, f"{target}: no space left on the disk")
        if unwritten:
            raise OSError(errno.EIO, f"{target}: {done.stderr.decode(errors='replace').strip()}")
        done.check_returncode()
        os.replace(scratch, target)
    return target


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def write_table(rows: Iterable[dict], path: str | Path, progress: str | None = None) -> int:
    """Writes rows to a Parquet file, atomically; returns their number.

    Raises:
        OSError: the disk is full, or the folder cannot be written. A table of that name from before stays as it was.
        ValueError: there are no rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    count = 0
    try:
        with ParquetWriter(features=FEATURES, path=str(scratch), writer_batch_size=1_000) as writer:
            for row in tqdm(rows, desc=progress, unit=" rows", disable=progress is None):
                writer.write(row)
                count += 1
            if count:
                writer.finalize()
        if not count:
            raise ValueError(f"{path}: there are no rows to write.")
        os.replace(scratch, path)
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC,
                f"{path} was not written after {count:,} rows: no space left on the disk. Free some and run again",
            ) from None
        raise
    finally:
        scratch.unlink(missing_ok=True)
    return count


def read_table(*paths: str | Path) -> datasets.Dataset:
    """The rows of one or several tables, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is no table of this schema, or damaged; or two of them have a row of the same corpus and id.
    """
    tables: list[datasets.Dataset] = []
    names: dict[tuple[str, str], str | Path] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist: `dual-slm corpus read` or `corpus build` makes a table.")
        try:
            table = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise ValueError(f"{path} is no table, or it is damaged ({error.__cause__ or error}).") from None
        if "voice_only" not in table.column_names:  # a table from before there was this column
            table = table.add_column("voice_only", [None] * len(table), feature=FEATURES["voice_only"])
        missing = [column for column in FEATURES if column not in table.column_names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it is no table of `dual-slm corpus`.")
        tables.append(table.select_columns(list(FEATURES)))
        here = set(zip(table["corpus"], table["id"], strict=True)) if len(paths) > 1 else set()
        if shared := here & names.keys():
            corpus, name = min(shared)
            raise ValueError(
                f"{len(shared):,} rows are in two tables, {names[corpus, name]} and {path}, the first is {name!r} of the "
                f"corpus {corpus!r}. Name a table once; if these are other clips, name another `corpus` in their metadata."
            )
        names |= dict.fromkeys(here, path)
    return datasets.concatenate_datasets(tables)
