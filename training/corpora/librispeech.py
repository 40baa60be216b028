"""LibriSpeech (https://www.openslr.org/12, CC BY 4.0): read English, official splits by speaker.

SPEAKERS.TXT    {subset}/{speaker}/{chapter}/{speaker}-{chapter}-{utterance}.flac and {speaker}-{chapter}.trans.txt
"""

from collections.abc import Iterator
from pathlib import Path

from .checks import Report
from .row import Row, make_row

_SPLIT = {"train": "train", "dev": "validation", "test": "test"}


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of all subsets below the root. Transcripts are in lower case; the corpus writes them in capitals."""
    root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    speakers = root / "SPEAKERS.TXT"
    if not speakers.is_file():
        raise FileNotFoundError(f"{speakers} does not exist: the root of LibriSpeech holds it beside the subsets.")
    lines = [line for line in speakers.read_text(encoding="utf-8").splitlines() if line and line[0] != ";"]
    fields = ([field.strip() for field in line.split("|")] for line in lines)
    gender = {number: {"F": "female", "M": "male"}.get(sex) for number, sex, *_ in fields}
    tables = sorted(root.glob("*/*/*/*.trans.txt"))
    if not tables:
        raise FileNotFoundError(f"{root} holds no {{subset}}/{{speaker}}/{{chapter}}/*.trans.txt.")
    for table in tables:
        subset, speaker = table.parts[-4], table.parts[-3]
        known = {"corpus": "librispeech", "split": _SPLIT.get(subset.split("-")[0])}
        known |= {"speaker": f"librispeech_{speaker}", "gender": gender.get(speaker), "subset": subset}
        if known["split"] is None:
            report.add("subset that is none of train-*, dev-*, test-*, left out", str(table.parents[2]))
            continue
        for line in table.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield make_row(**known, id=name, audio=str(table.parent / f"{name}.flac"), transcript=text.strip().lower())
