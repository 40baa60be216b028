"""MELD (https://github.com/declare-lab/MELD): dialogue of a television series, seven emotions, official splits.

    {train,dev,test}_sent_emo.csv    train_splits/, dev_splits_complete/, output_repeated_splits_test/: dia{D}_utt{U}.mp4

Ids start anew in each split, gender is not given, and a few clips of the release cannot be used (train dia125_utt3, dev
dia110_utt7): they are counted as damaged. The cast is the same in all splits, by the corpus's design.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from .schema import Report, clean_text, make_row, messages, read_csv

_SPLITS = {
    "train": ("train", ("train_splits", "train/train_splits")),
    "dev": ("validation", ("dev_splits_complete", "dev/dev_splits_complete")),
    "test": ("test", ("output_repeated_splits_test", "test/output_repeated_splits_test")),
}
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


def read(root: Path, report: Report) -> Iterator[dict]:
    """Rows of the three splits. Where the utterance numbers of a dialogue leave a gap, the history starts behind it."""
    for name, (split, folders) in _SPLITS.items():
        table = next(
            (t for t in (root / f"{name}_sent_emo.csv", root / name / f"{name}_sent_emo.csv") if t.is_file()), None
        )
        if table is None:
            raise FileNotFoundError(f"{root} holds no {name}_sent_emo.csv.")
        folder = next((root / f for f in folders if (root / f).is_dir()), root / folders[0])
        records = read_csv(table, _COLUMNS)
        for dialogue, turns in itertools.groupby(records, key=lambda r: int(r["Dialogue_ID"])):
            earlier, expected = [], 0
            for record in turns:
                number, speaker = int(record["Utterance_ID"]), record["Speaker"]
                text = clean_text(record["Utterance"])
                if number != expected:
                    report.add(
                        "gap in a dialogue; the history starts behind it", f"{table}, dialogue {dialogue}, {number}"
                    )
                    earlier = []
                clip = f"dia{dialogue}_utt{number}"
                yield make_row(
                    id=f"{split}/{clip}",
                    corpus="meld",
                    split=split,
                    audio=str(folder / f"{clip}.mp4"),
                    transcript=text,
                    speaker=speaker,
                    emotion=record["Emotion"],
                    dialogue=f"{split}/{dialogue}",
                    turn=number,
                    history=messages(earlier, speaker),
                )
                earlier.append((speaker, text))
                expected = number + 1
