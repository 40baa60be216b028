"""Pitch, energy and tempo of a clip, their classes by published borders or one's own tertiles, and captions of them."""

import json
import multiprocessing
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from ..processing_dual_slm import load_audio
from .corpora.schema import Report
from .journal import Journal
from .prompts import PROMPTS


@dataclass(frozen=True)
class Thresholds:
    """Borders of low | normal | high. Defaults: TextrolSpeech's (jishengpeng/TextrolSpeech, dataprocess.py)."""

    pitch: tuple[float, float] = (136.57698522, 196.09780757)  # Hz, mean F0 of voiced frames
    energy: tuple[float, float] = (0.03331899, 0.05054203)  # mean RMS, full scale 1
    tempo: tuple[float, float] = (0.252, 0.38645446)  # seconds a word: below the first is fast, above the second slow


MEASURED = {"pitch": "pitch_hz", "energy": "energy_rms", "tempo": "seconds_per_word"}  # attribute -> column of a table


def load_pyworld() -> ModuleType:
    """pyworld, without the warning of its import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources")  # pyworld 0.3.5 asks it for its own version
        import pyworld
    return pyworld


def pitch_track(samples: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """F0 in Hz (0 where there is no voice) and its times in seconds, by pyworld's dio and stonemask; samples in float64."""
    pyworld = load_pyworld()
    f0, times = pyworld.dio(samples, sampling_rate)
    return pyworld.stonemask(samples, f0, times, sampling_rate), times


def measure(samples: np.ndarray, sampling_rate: int, transcript: str | None = None) -> dict[str, float | None]:
    """Mean F0 in Hz (pyworld's dio and stonemask), mean RMS (librosa), seconds a word with silence trimmed.

    `None` where there is nothing to measure: no voiced frame, no transcript.
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


def classify(measured: dict[str, float | None], thresholds: Thresholds) -> dict[str, str | None]:
    """low | normal | high for pitch and energy, slow | normal | fast for tempo, `None` where nothing was measured."""
    names = {
        "pitch": ("low", "normal", "high"),
        "energy": ("low", "normal", "high"),
        "tempo": ("fast", "normal", "slow"),
    }
    result = {}
    for name, classes in names.items():
        value = measured.get(name)
        result[name] = (
            None if value is None else classes[int(np.searchsorted(getattr(thresholds, name), value, "right"))]
        )
    return result


# --------------------------------------------------------------------------------------------------------------------
# A table's labels
# --------------------------------------------------------------------------------------------------------------------


def tertiles(rows: Iterable[dict]) -> dict[str, Thresholds]:
    """Borders that cut the training rows into thirds, within each gender and over all (for rows of unknown gender).

    Raises:
        ValueError: fewer than 30 measured training rows.
    """
    rows = [row for row in rows if row["split"] == "train"]
    result = {}
    for gender in ("all", "female", "male"):
        borders = {}
        for name, column in MEASURED.items():
            values = [r[column] for r in rows if r[column] is not None and gender in ("all", r["gender"])]
            if len(values) >= 30:
                borders[name] = tuple(round(float(q), 5) for q in np.quantile(values, [1 / 3, 2 / 3]))
        if len(borders) == len(MEASURED):
            result[gender] = Thresholds(**borders)
    if "all" not in result:
        raise ValueError(
            f"{len(rows)} training rows are too few for tertiles (30 with audio and transcript); use the published "
            "thresholds, or the file of another corpus."
        )
    return result


def read_thresholds(path: str | Path) -> dict[str, Thresholds]:
    """Borders that `corpus label` wrote beside a table."""
    return {gender: Thresholds(**borders) for gender, borders in json.loads(Path(path).read_text()).items()}


def write_thresholds(thresholds: dict[str, Thresholds], path: str | Path) -> None:
    text = json.dumps({gender: asdict(borders) for gender, borders in thresholds.items()}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _measure_row(job: tuple[str, str, str | None]) -> tuple[str, list | str]:
    name, audio, transcript = job
    try:
        measured = measure(load_audio(audio, target_rate=16_000), 16_000, transcript)
    except (ValueError, OSError) as error:
        return name, " ".join(str(error).split())
    return name, [measured[attribute] for attribute in MEASURED]


def measure_rows(rows: list[dict], journal: Journal, report: Report, processes: int | None = None) -> Iterator[dict]:
    """Rows with `pitch_hz`, `energy_rms` and `seconds_per_word`. Those whose audio cannot be decoded are left out and
    counted. What is in the journal is not measured again."""
    jobs = [
        (row["id"], row["audio"], row["transcript"])
        for row in rows
        if row["audio"] is not None and row["id"] not in journal.values and row["energy_rms"] is None
    ]
    if jobs:
        # Threads would wait for each other in pyworld, and forking a process that runs torch hangs.
        with ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            results = tqdm(pool.map(_measure_row, jobs, chunksize=16), total=len(jobs), desc="labels", unit=" clips")
            group = {}
            for name, values in results:
                group[name] = values
                if len(group) == 256:
                    journal.add(group)
                    group = {}
            journal.add(group)
    for row in rows:
        values = journal.values.get(row["id"])
        if isinstance(values, str):
            report.add("audio that cannot be decoded, left out", values)
            continue
        yield row if values is None else row | dict(zip(MEASURED.values(), values, strict=True))


def label_row(row: dict, thresholds: dict[str, Thresholds], seed: int = 0, overwrite: bool = False) -> dict:
    """The row with pitch, tempo and energy from its measured values, and a caption. What a corpus says itself stays,
    unless `overwrite`."""
    borders = thresholds.get(row["gender"], thresholds["all"])
    found = classify({name: row[column] for name, column in MEASURED.items()}, borders)
    row = row | {name: label for name, label in found.items() if label and (overwrite or row[name] is None)}
    if overwrite or row["caption"] is None:
        row["caption"] = describe(row, random.Random(f"{seed}/caption/{row['id']}"))
    return row


# --------------------------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------------------------


def describe(attributes: dict[str, str | None], draw: random.Random) -> str | None:
    """A caption of whichever attributes are known, in one of several wordings; `None` where none is."""
    style = draw.choice(PROMPTS["captions"])
    words = []
    for name, part in style["parts"].items():
        label = attributes.get(name)
        if label is not None:
            words.append(part[label] if isinstance(part, dict) else part.format(label))
    if not words:
        return None
    last = style.get("last", style["join"])
    text = style["join"].join(words[:-1]) + last + words[-1] if len(words) > 1 else words[0]
    return style["open"] + text + style["close"]
