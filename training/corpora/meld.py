"""MELD (https://github.com/declare-lab/MELD): dialogue of a television series, seven emotions, official splits.

    {train,dev,test}_sent_emo.csv    train_splits/, dev_splits_complete/, output_repeated_splits_test/: dia{D}_utt{U}.mp4

Dialogue numbers start anew in each split, and gender is not given. Two clips of the release are damaged and counted as
such: train dia125_utt3 and dev dia110_utt7. All splits share their speakers, by the corpus's design.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from .checks import Report
from .reading import clean_text, messages, read_csv
from .row import Row, make_row

# File name -> split, and folder of its clips.
_SPLITS = {"train": ("train", "train_splits"), "dev": ("validation", "dev_splits_complete")}
_SPLITS |= {"test": ("test", "output_repeated_splits_test")}
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of the three splits. After a gap in the utterance numbers of a dialogue the history starts anew."""
    for name, (split, clips) in _SPLITS.items():
        table = next((f for p in (root, root / name) if (f := p / f"{name}_sent_emo.csv").is_file()), None)
        if table is None:
            raise FileNotFoundError(f"{root} holds no {name}_sent_emo.csv.")
        folder = next((f for p in (root, root / name) if (f := p / clips).is_dir()), root / clips)
        records = read_csv(table, _COLUMNS)
        for dialogue, turns in itertools.groupby(records, key=lambda r: int(r["Dialogue_ID"])):
            known = {"corpus": "meld", "split": split, "dialogue": f"{split}/{dialogue}"}
            earlier, expected = [], 0
            for record in turns:
                number, speaker = int(record["Utterance_ID"]), record["Speaker"]
                text = clean_text(record["Utterance"])
                if number != expected:
                    example = f"{table}, dialogue {dialogue}, {number}"
                    report.add("gap in a dialogue; the history starts after it", example)
                    earlier = []
                clip = f"dia{dialogue}_utt{number}"
                known |= {"id": f"{split}/{clip}", "turn": number, "audio": str(folder / f"{clip}.mp4")}
                known |= {"transcript": text, "speaker": speaker, "emotion": record["Emotion"]}
                yield make_row(**known, history=messages(earlier, speaker))
                earlier.append((speaker, text))
                expected = number + 1
