"""Synthesises a speech corpus: synthesisers speak texts, then each clip gets a vocal tract and recording conditions.

`dual-slm corpus build` writes a folder that `corpus read folder` reads. The sentence, voice, speed, vocal tract, room,
noise and level of a clip depend on (seed, index) alone. An interrupted run continues where it stopped.
"""

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from ..batches import batched
from ..files import ASSETS, atomic, read_json, write_text
from .acoustics import ANY_LEVEL, SAMPLING_RATE, degrade
from .folder import write_metadata
from .row import Row
from .table import read_table
from .voices import ENGINES, VOICES, reset_voices, speak

BLOCK = 32  # clips that one call makes; piper's noise depends on what its session has spoken before
_KEPT = ("tempo", "energy", "split", "history", "dialogue", "turn")  # columns of a row that is spoken
# Natural logarithm of the stretch of each tempo, and peak level of each energy in dB below full scale.
_STRETCH = {"slow": (0.15, 0.40), "normal": (-0.08, 0.08), "fast": (-0.40, -0.15), None: (-0.35, 0.35)}
_LEVEL = {"low": (18, 26), "normal": (8, 14), "high": (1, 5), None: ANY_LEVEL}


def span(sentence: str, rng: np.random.Generator, shortest: int = 3, longest: int = 22) -> str:
    """A random run of words of a sentence, so that the lengths of clips vary."""
    words = sentence.split()
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, max(len(words) - length, 0) + 1))
    return " ".join(words[start : start + length])


def make_clip(
    text: str,
    seed: int,
    index: int,
    tempo: str | None = None,
    energy: str | None = None,
    engines: Sequence[str] = ENGINES,
    split: str | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Speaks one clip: float32 samples at 16 kHz, and its speaker, gender and split.

    A voice that cannot say the text gives no samples. `None` for tempo, energy or split is any.

    Args:
        index: of the clip. It draws the voice by the voices' shares.
        engines, split: whose voices may speak.
    """
    rng = np.random.default_rng([seed, index])
    voices = [voice for voice in VOICES if voice.engine in engines and split in (None, voice.split)]
    shares = np.array([voice.share for voice in voices])
    voice = voices[rng.choice(len(voices), p=shares / shares.sum())]
    tract = math.exp(rng.uniform(-0.18, 0.22))  # > 1: a shorter vocal tract, a higher voice
    stretch = tract * math.exp(rng.uniform(*_STRETCH[tempo]))
    audio, rate = speak(voice, text, stretch, rng)
    if len(audio):
        audio = degrade(soxr.resample(audio, rate * tract, SAMPLING_RATE), rng, _LEVEL[energy])
    # Another vocal tract may sound like another gender, so it is known only where the voice was hardly changed.
    gender = voice.gender if abs(math.log(tract)) < 0.08 else None
    speaker = f"{voice.engine}/{voice.name}/{tract:.2f}"
    return audio.astype(np.float32), {"speaker": speaker, "gender": gender, "split": voice.split}


def _make_block(
    first: int, items: list[dict[str, Any]], seed: int, output: Path, engines: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Metadata of the clips from number `first`. They are made, unless they were finished before."""
    names = [f"audio/{index // 1000:03d}/{index:06d}.flac" for index in range(first, first + len(items))]
    finished = (output / names[0]).with_name(f"block-{first:06d}.json")
    made_of = hashlib.sha256(json.dumps([seed, engines, items]).encode()).hexdigest()
    if finished.is_file():
        known = read_json(finished)
        if isinstance(known, list) or known["made_of"] != made_of:  # older versions wrote a list
            raise ValueError(f"{output} holds clips of another seed, other texts or engines. Name another folder.")
        return known["rows"]
    reset_voices(seed * 1_000_003 + first)
    records = []
    for index, (name, item) in enumerate(zip(names, items, strict=True), first):
        said = {key: item.get(key) for key in ("tempo", "energy", "split")}
        audio, spoken = make_clip(item["text"], seed, index, engines=engines, **said)
        if len(audio) < 0.3 * SAMPLING_RATE:  # the voice says nothing (flite on some words)
            continue
        with atomic(output / name) as scratch:
            soundfile.write(scratch, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        record = {"id": f"synthetic/{seed}/{index:06d}", "file": name, "corpus": "synthetic"}
        record |= spoken | {"duration": round(len(audio) / SAMPLING_RATE, 3)}
        records.append(record | {key: value for key, value in item.items() if key not in said})
    write_text(finished, json.dumps({"made_of": made_of, "rows": records}, ensure_ascii=False))
    return records


def build(
    texts: Sequence[str] | Sequence[Row],
    output: str | Path,
    hours: float | None = None,
    seed: int = 0,
    processes: int | None = None,
    engines: Sequence[str] = ENGINES,
) -> Path:
    """Speaks texts into a folder and returns its metadata file. Unknown engines and other clips are a ValueError.

    Args:
        texts: sentences or rows. Random spans of the sentences are spoken in lower case until there are `hours` of audio.
            The transcript of each row is spoken once, as it is, by a voice of its split and in its tempo and energy. A
            row keeps its history, dialogue and turn.
        hours: of audio at most. Sentences need it; rows may do without.
        processes: default: one for each core.
        engines: whose voices speak.
    """
    items, first, records, seconds = _items(texts, hours, engines, seed), 0, [], 0.0
    output, limit = Path(output), math.inf if hours is None else hours * 3600
    output.mkdir(parents=True, exist_ok=True)
    processes = processes or os.cpu_count() or 1
    make_block = functools.partial(_make_block, seed=seed, output=output, engines=tuple(engines))
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=None if hours is None else round(limit), unit="s of speech", desc="synthesis") as bar,
    ):
        # `map` takes all jobs before the first result, and sentences never end: it gets a few jobs at a time.
        while seconds < limit and (part := list(itertools.islice(items, processes * BLOCK))):
            made = pool.map(make_block, itertools.count(first, BLOCK), batched(part, BLOCK))
            first += len(part)
            for record in itertools.chain.from_iterable(made):
                if seconds < limit:
                    records.append(record)
                    seconds += record["duration"]
                    bar.update(record["duration"])
    return write_metadata(records, output)


def _items(
    texts: Sequence[str] | Sequence[Row], hours: float | None, engines: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """The text of each clip, and what is kept of its row; spans of sentences without end."""
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ValueError(f"engines {', '.join(unknown) or '(none)'}: there are {', '.join(ENGINES)}.")
    if not texts:
        raise ValueError("there is no text to speak.")
    rows = [text for text in texts if isinstance(text, Row)]
    if not rows:
        if hours is None:
            raise ValueError("sentences are spoken again and again: name the `hours` of audio.")
        sentences = [" ".join(str(text).split()).lower() for text in texts]
        draws = (np.random.default_rng([seed, index, 1]) for index in itertools.count())
        return ({"text": span(sentences[int(rng.integers(len(sentences)))], rng)} for rng in draws)
    able = {voice.split for voice in VOICES if voice.engine in engines}
    unheard = [row for row in rows if row.split not in able]
    if unheard:
        raise ValueError(
            f"{len(unheard):,} rows are of a split that no voice of {', '.join(engines)} is for, the first is of "
            f"{unheard[0].split!r}: name more engines, or leave such rows out."
        )
    return ({"text": row.transcript} | {k: value for k in _KEPT if (value := getattr(row, k))} for row in rows)


def read_texts(path: str | Path | None) -> list[str] | list[Row]:
    """Texts to speak: the rows of a table, or the lines of a text file. Default: the package's own sentences."""
    path = Path(path or ASSETS / "sentences.txt")
    if path.suffix == ".parquet":
        return [row for row in read_table(path) if row.transcript]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line.split()) >= 3 and not line.startswith("#")]
