"""TextrolSpeech (https://github.com/jishengpeng/TextrolSpeech): how it is said, in words, for clips of seven corpora.

    *.csv anywhere below the root:
      wav_fp, item_name, gender, pitch, tempo, energy, emotion, style_prompt, content_prompt      TextrolSpeech
      item_name, dur, pitch, energy, gender, emotion, spk, txt, style_prompt                      VccmDataset (same authors)

Audio is at `wav_fp` below the root, or in a file of the item's name anywhere below it. The official test set has only
200 rows, so the paper splits the corpus itself (section IV-A). We split by speaker: 5 % of the speakers of each source
corpus are test and as many validation, by a hash of their name; at least one each if the corpus has three.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..text import hash_uniform
from .checks import Report
from .reading import clean_text, read_csv
from .row import Row, make_row

_NEW = ("item_name", "gender", "pitch", "tempo", "energy", "emotion", "style_prompt", "content_prompt")
_VCCM = ("item_name", "dur", "pitch", "energy", "gender", "emotion", "spk", "txt", "style_prompt")
_TEMPO = {"low": "slow", "normal": "normal", "high": "fast"}
_GENDER = {"f": "female", "m": "male", "female": "female", "male": "male"}
_AUDIO = (".wav", ".flac", ".mp3", ".ogg")
# Speaker in the file names of each source corpus.
_SPEAKERS = (
    ("cremad", r"(?:^|[^0-9])(1[0-9]{3})_[A-Z]{3}_[A-Z]{3}_[A-Z]{2}$"),
    ("mead", r"(?:^|[^A-Z])([MW][0-9]{3})-"),
    ("esd", r"(?:^|[^0-9])(00[0-2][0-9])_[0-9]{6}$"),
    ("vctk", r"(?:^|[^a-z])([ps][0-9]{3})_[0-9]{3}"),
    ("libritts", r"^([0-9]+)_[0-9]+_[0-9]{6}_[0-9]{6}$"),
    ("tess", r"(?:^|[^A-Z])(OAF|YAF)_"),
    ("savee", r"(?:^|[^A-Z])(DC|JE|JK|KL)_"),
)


def speaker_of(item: str) -> tuple[str, str] | None:
    """Source corpus and speaker from the name of an item; None if no rule fits."""
    found = ((corpus, re.search(pattern, item)) for corpus, pattern in _SPEAKERS)
    return next(((corpus, match[1]) for corpus, match in found if match), None)


def read(root: Path, report: Report, seed: int = 0) -> Iterator[Row]:
    """Rows of all CSV files below the root. The emotion "nan" is None."""
    tables = sorted(root.rglob("*.csv"))
    if not tables:
        raise FileNotFoundError(f"{root} holds no csv file.")
    files = {f.stem: f for f in root.rglob("*") if f.suffix.lower() in _AUDIO}
    records, speakers = [], {}
    for table in tables:
        columns = next(iter(read_csv(table, ())), {})
        if {"item_name", "style_prompt"} & columns.keys():
            records += read_csv(table, _VCCM if "spk" in columns else _NEW)
        else:
            report.add("csv that is no table of captions, left out", str(table))
    if not records:
        raise FileNotFoundError(f"{root} holds no csv with captions (item_name, style_prompt ...).")
    for record in records:
        source = speaker_of(record["item_name"])  # first: both kinds of CSV must name a speaker alike
        if source is None and record.get("spk"):
            source = record["spk"].rpartition("-")[0] or "libritts", record["spk"]
        speakers[record["item_name"]] = source
    splits = _split_speakers({source for source in speakers.values() if source is not None}, seed)
    for record in records:
        item, source = record["item_name"], speakers[record["item_name"]]
        known = {"id": item, "corpus": "textrolspeech", "split": "train"}
        if source is None:
            report.add("item whose speaker cannot be told; it goes to train", item)
        else:
            # The name that the corpus's own reader gives the speaker; LibriTTS has the speakers of LibriSpeech.
            known["speaker"] = f"{'librispeech' if source[0] == 'libritts' else source[0]}_{source[1]}"
            known["split"] = splits[source]
        file = root / record["wav_fp"] if record.get("wav_fp") else files.get(item, root / f"{item}.wav")
        known |= {"audio": str(file), "pitch": record["pitch"], "energy": record["energy"]}
        known |= {"transcript": clean_text(record.get("content_prompt") or record.get("txt") or "")}
        yield make_row(
            **known,
            caption=clean_text(record["style_prompt"]),
            gender=_GENDER.get(record["gender"].lower()),
            tempo=_TEMPO.get(record.get("tempo") or record.get("dur")),
            emotion=None if record["emotion"] == "nan" else record["emotion"],
        )


def _split_speakers(speakers: set[tuple[str, str]], seed: int) -> dict[tuple[str, str], str]:
    """Split of each (corpus, speaker); the paper's own split is not public."""
    by_corpus, splits = defaultdict(list), {}
    for speaker in speakers:
        by_corpus[speaker[0]].append(speaker)
    for members in by_corpus.values():
        members.sort(key=lambda m: hash_uniform("/".join(m), seed))
        held = math.ceil(0.05 * len(members)) if len(members) >= 3 else 0
        splits |= dict.fromkeys(members, "train") | dict.fromkeys(members[: 2 * held], "validation")
        splits |= dict.fromkeys(members[:held], "test")
    return splits
