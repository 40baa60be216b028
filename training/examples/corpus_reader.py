"""Reads a corpus of one's own into a table that `dual-slm corpus label` and `dual-slm train` take.

python -m dual_slm.training.examples.corpus_reader ROOT TABLE

The corpus of this example is a folder for each speaker, with clips `EMOTION-NUMBER.wav` and their words in files
`EMOTION-NUMBER.txt`. The last speaker is the test split, so that no speaker is in two splits.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from dual_slm.training.corpora.checks import Report, check_rows
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import write_table


def read(root: Path, report: Report) -> Iterator[Row]:
    """A row for each clip; clips without words are counted in the report."""
    speakers = sorted(folder for folder in root.iterdir() if folder.is_dir())
    for speaker in speakers:
        for audio in sorted(speaker.glob("*.wav")):
            words = audio.with_suffix(".txt")
            if not words.is_file():
                report.add("clip without words, left out", str(audio))
                continue
            yield make_row(
                id=f"{speaker.name}/{audio.stem}",
                corpus=root.name,
                split="test" if speaker == speakers[-1] else "train",
                audio=str(audio),
                transcript=words.read_text(encoding="utf-8").strip(),
                speaker=speaker.name,
                emotion=audio.stem.split("-")[0],
            )


def main(root: str, table: str) -> int:
    """Writes the table and returns its number of rows."""
    report = Report()
    count = write_table(check_rows(read(Path(root).resolve(), report), report), table)
    print(report or f"{count} rows in {table}")
    return count


if __name__ == "__main__":
    main(*sys.argv[1:3])
