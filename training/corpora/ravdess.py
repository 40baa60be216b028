"""RAVDESS (https://zenodo.org/records/1188976, CC BY-NC-SA 4.0): 24 actors, two sentences, eight emotions.

    Actor_{AA}/03-01-{emotion}-{intensity}-{sentence}-{repetition}-{actor}.wav, below any folder, in any audio format

The corpus has no split: actors 1-14 are train, 15-16 validation, 17-24 test.
"""

from collections.abc import Iterator
from pathlib import Path

from .checks import Report
from .row import Row, make_row

_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_TEXTS = ("Kids are talking by the door.", "Dogs are sitting by the door.")


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of the spoken clips (03-01); songs and videos are counted and left out."""
    files = sorted(f for f in root.rglob("*-*-*-*-*-*-*.*") if f.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    if not files:
        raise FileNotFoundError(f"{root} holds no files named like 03-01-01-01-01-01-01.wav.")
    for file in files:
        fields = file.stem.split("-")
        if fields[:2] != ["03", "01"]:
            report.add("clip that is a song, left out", str(file))
            continue
        emotion, _, sentence, _, actor = (int(field) for field in fields[2:])
        split = "train" if actor <= 14 else "validation" if actor <= 16 else "test"
        known = {"id": file.stem, "corpus": "ravdess", "split": split, "audio": str(file)}
        known |= {"speaker": f"ravdess_{actor:02d}", "gender": "male" if actor % 2 else "female"}
        yield make_row(**known, transcript=_TEXTS[sentence - 1], emotion=_EMOTIONS[emotion - 1])
