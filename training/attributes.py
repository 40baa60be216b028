"""Pitch, energy and tempo of a clip, their classes by published borders or one's own tertiles, and captions of them."""

import itertools
import multiprocessing
import os
import random
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from ..audio_dual_slm import load_audio
from .corpora.checks import Report
from .corpora.row import Row
from .files import Journal, read_json, write_json
from .labels import ATTRIBUTES, LEVELS, MEASURED
from .prompts import PROMPTS

# Classes of each measured attribute, from small to large values.
_CLASSES = {"pitch": LEVELS["pitch"], "energy": LEVELS["energy"], "tempo": LEVELS["tempo"][::-1]}


@dataclass(frozen=True)
class Thresholds:
    """Borders between the three classes. Defaults: TextrolSpeech's (jishengpeng/TextrolSpeech, dataprocess.py)."""

    pitch: tuple[float, float] = (136.57698522, 196.09780757)  # Hz, mean F0 of voiced frames
    energy: tuple[float, float] = (0.03331899, 0.05054203)  # mean RMS, full scale 1
    tempo: tuple[float, float] = (0.252, 0.38645446)  # seconds a word: fast below the first, slow above the second


def load_pyworld() -> ModuleType:
    """pyworld, without the warning of its import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources")  # pyworld 0.3.5 asks it for its own version
        import pyworld
    return pyworld


def pitch_track(samples: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """F0 of each frame of float64 samples in Hz (0: unvoiced), and its times in seconds, by pyworld."""
    pyworld = load_pyworld()
    f0, times = pyworld.dio(samples, sampling_rate)
    return pyworld.stonemask(samples, f0, times, sampling_rate), times


def measure(samples: np.ndarray, sampling_rate: int, transcript: str | None = None) -> dict[str, float | None]:
    """Mean F0 in Hz (pyworld), mean RMS (librosa), and seconds a word without leading and trailing silence.

    The pitch is None without a voiced frame, the tempo without a transcript.
    """
    import librosa

    f0, _ = pitch_track(samples.astype(np.float64), sampling_rate)
    voiced = f0[f0 > 0]
    words = len((transcript or "").split())
    trimmed, _ = librosa.effects.trim(samples, top_db=30)
    return {
        "pitch": float(voiced.mean()) if len(voiced) else None,
        "energy": float(librosa.feature.rms(y=samples).mean()),
        "tempo": len(trimmed) / sampling_rate / words if words else None,
    }


def classify(measured: Mapping[str, float | None], thresholds: Thresholds) -> dict[str, str | None]:
    """Class of pitch, energy and tempo; None where nothing was measured."""
    result: dict[str, str | None] = {}
    for name, classes in _CLASSES.items():
        value = measured.get(name)
        result[name] = None if value is None else classes[bisect_right(getattr(thresholds, name), value)]
    return result


def tertiles(rows: Iterable[Row]) -> dict[str, Thresholds]:
    """Borders that cut the training rows into thirds: for each gender, and over "all" for rows of unknown gender."""
    rows = [row for row in rows if row.split == "train"]
    result = {}
    for gender in ("all", "female", "male"):
        members = [row for row in rows if gender in ("all", row.gender)]
        values = {k: [v for r in members if (v := getattr(r, column)) is not None] for k, column in MEASURED.items()}
        if min(map(len, values.values())) >= 30:
            low, high = ({k: round(float(np.quantile(v, q)), 5) for k, v in values.items()} for q in (1 / 3, 2 / 3))
            result[gender] = Thresholds(**{name: (low[name], high[name]) for name in MEASURED})
    if "all" not in result:
        raise ValueError(
            f"{len(rows)} training rows are too few for tertiles (30 with audio and transcript); use the published "
            "thresholds, or the file of another corpus."
        )
    return result


def read_thresholds(path: str | Path) -> dict[str, Thresholds]:
    """Borders that `corpus label` wrote beside a table."""
    return {gender: Thresholds(**borders) for gender, borders in read_json(path).items()}


def write_thresholds(thresholds: dict[str, Thresholds], path: str | Path) -> None:
    write_json(path, {gender: asdict(borders) for gender, borders in thresholds.items()})


def _measure_row(job: tuple[str, str, str | None]) -> tuple[str, list | str]:
    """The id of a row, and its measured values or what is wrong with its audio."""
    row_id, audio, transcript = job
    try:
        measured = measure(load_audio(audio, target_rate=16_000), 16_000, transcript)
    except (ValueError, OSError) as error:
        return row_id, " ".join(str(error).split())
    return row_id, [measured[attribute] for attribute in MEASURED]


def measure_rows(rows: Sequence[Row], journal: Journal, report: Report, processes: int | None = None) -> Iterator[Row]:
    """Rows with `pitch_hz`, `energy_rms` and `seconds_per_word`. What the journal has is not measured again.

    Rows whose audio cannot be decoded are left out and counted in the report.
    """
    new = (row for row in rows if row.audio and row.id not in journal.values and row.energy_rms is None)
    jobs = [(row.id, str(row.audio), row.transcript) for row in new]
    if jobs:
        # Threads would wait for each other in pyworld, and forking a process that runs torch hangs.
        with ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            results = pool.map(_measure_row, jobs, chunksize=16)
            results = iter(tqdm(results, total=len(jobs), desc="labels", unit=" clips"))
            while group := dict(itertools.islice(results, 256)):
                journal.add(group)
    for row in rows:
        values = journal.values.get(row.id)
        if isinstance(values, str):
            report.add("audio that cannot be decoded, left out", values)
        else:
            yield row.replace(**dict(zip(MEASURED.values(), values, strict=True))) if values else row


def _classes(row: Row, thresholds: Thresholds) -> dict[str, str]:
    """Classes of what was measured of a row."""
    found = classify({name: getattr(row, column) for name, column in MEASURED.items()}, thresholds)
    return {name: label for name, label in found.items() if label}


def label_row(row: Row, thresholds: dict[str, Thresholds], seed: int = 0, overwrite: bool = False) -> Row:
    """The row with pitch, tempo and energy from its measured values, and a caption.

    What the corpus itself says stays, unless `overwrite`.
    """
    found = _classes(row, thresholds.get(row.gender or "all", thresholds["all"]))
    row = row.replace(**{name: label for name, label in found.items() if overwrite or row.label(name) is None})
    if overwrite or row.caption is None:
        row = row.replace(caption=describe(row, random.Random(f"{seed}/caption/{row.id}")))
    return row


def relabel(row: Row, thresholds: Thresholds | None) -> Row:
    """The row with its pitch, energy and tempo by the borders of a checkpoint. Labels that were not measured stay."""
    if thresholds is None:
        return row
    found = _classes(row, thresholds)
    return row.replace(**{name: label for name, label in found.items() if row.label(name)})


def describe(attributes: Row | Mapping[str, str | None], draw: random.Random) -> str | None:
    """A caption of the known attributes in a random wording; None if none is known."""
    if isinstance(attributes, Row):
        attributes = {name: attributes.label(name) for name in ATTRIBUTES}
    style = draw.choice(PROMPTS["captions"])
    known = ((part, attributes[name]) for name, part in style["parts"].items() if attributes.get(name) is not None)
    words = [part[label] if isinstance(part, dict) else part.format(label) for part, label in known]
    if len(words) > 1:
        words = [style["join"].join(words[:-1]), words[-1]]
    return style["open"] + style.get("last", style["join"]).join(words) + style["close"] if words else None
