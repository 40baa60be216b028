"""TextrolSpeech (https://github.com/jishengpeng/TextrolSpeech): how it is said, in words, for clips of seven corpora.

    *.csv anywhere below the root:
      wav_fp, item_name, gender, pitch, tempo, energy, emotion, style_prompt, content_prompt      TextrolSpeech
      item_name, dur, pitch, energy, gender, emotion, spk, txt, style_prompt                      VccmDataset (same authors)

Audio lies at `wav_fp` below the root, or anywhere below it under the item's name. The official test set has 200 rows, so
the paper makes a split of its own (section IV-A); so do we, by speaker: 5 % of the speakers of each source corpus (at
least one, if it has three) are test and as many are validation, by a hash of their name.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .schema import Report, clean_text, make_row, read_csv, share

_NEW = ("item_name", "gender", "pitch", "tempo", "energy", "emotion", "style_prompt", "content_prompt")
_VCCM = ("item_name", "dur", "pitch", "energy", "gender", "emotion", "spk", "txt", "style_prompt")
_TEMPO = {"low": "slow", "normal": "normal", "high": "fast"}
_GENDER = {"f": "female", "m": "male", "female": "female", "male": "male"}
_AUDIO = (".wav", ".flac", ".mp3", ".ogg")
# How each source corpus writes a speaker in its file names.
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
    """(source corpus, speaker) from the name of an item, `None` where no rule fits."""
    for corpus, pattern in _SPEAKERS:
        if found := re.search(pattern, item):
            return corpus, found[1]
    return None


def _name(corpus: str, speaker: str) -> str:
    """As the corpora's own readers name the same person; LibriTTS's speakers are LibriSpeech's."""
    return f"{'librispeech' if corpus == 'libritts' else corpus}_{speaker}"


def read(root: Path, report: Report, seed: int = 0) -> Iterator[dict]:
    """Rows of every csv below the root. "nan" as an emotion is null."""
    tables = sorted(root.rglob("*.csv"))
    if not tables:
        raise FileNotFoundError(f"{root} holds no csv file.")
    files = {f.stem: f for f in root.rglob("*") if f.suffix.lower() in _AUDIO}
    records = []
    for table in tables:
        columns = next(iter(read_csv(table, ())), {})
        if not {"item_name", "style_prompt"} & columns.keys():
            report.add("csv that is no table of captions, left out", str(table))
            continue
        records += [(table, record) for record in read_csv(table, _VCCM if "spk" in columns else _NEW)]
    if not records:
        raise FileNotFoundError(f"{root} holds no csv with captions (item_name, style_prompt ...).")
    speakers = {}
    for _, record in records:
        item = record["item_name"]
        speakers[item] = speaker_of(item)  # first, so that both kinds of csv name a speaker alike
        if speakers[item] is None and record.get("spk"):
            corpus, _, _ = record["spk"].rpartition("-")
            speakers[item] = (corpus or "libritts", record["spk"])
    splits = _split_speakers({s for s in speakers.values() if s is not None}, seed)
    for _, record in records:
        item, source = record["item_name"], speakers[record["item_name"]]
        if source is None:
            report.add("item whose speaker cannot be told; it goes to train", item)
        file = root / record["wav_fp"] if record.get("wav_fp") else files.get(item, root / f"{item}.wav")
        tempo, emotion = record.get("tempo") or record.get("dur"), record["emotion"]
        yield make_row(
            id=item,
            corpus="textrolspeech",
            split="train" if source is None else splits[source],
            audio=str(file),
            transcript=clean_text(record.get("content_prompt") or record.get("txt") or ""),
            caption=clean_text(record["style_prompt"]),
            speaker=None if source is None else _name(*source),
            gender=_GENDER.get(record["gender"].lower()),
            pitch=record["pitch"],
            tempo=_TEMPO.get(tempo),
            energy=record["energy"],
            emotion=None if emotion in ("nan", "") else emotion,
        )


def _split_speakers(speakers: set[tuple[str, str]], seed: int) -> dict[tuple[str, str], str]:
    """Split of each (corpus, speaker): the paper's own one is not public."""
    by_corpus = defaultdict(list)
    for corpus, speaker in speakers:
        by_corpus[corpus].append((corpus, speaker))
    splits = {}
    for members in by_corpus.values():
        members.sort(key=lambda m: share("/".join(m), seed))
        held = math.ceil(0.05 * len(members)) if len(members) >= 3 else 0
        for place, member in enumerate(members):
            splits[member] = "test" if place < held else "validation" if place < 2 * held else "train"
    return splits
