"""IEMOCAP (https://sail.usc.edu/iemocap, on request): five sessions of two actors each, acted and improvised dialogues.

    Session{n}/dialog/EmoEvaluation/{dialogue}.txt    the label that the listeners agreed on
    Session{n}/dialog/transcriptions/{dialogue}.txt    Session{n}/sentences/wav/{dialogue}/{utterance}.wav

The usual task has four emotions: angry, happy (with excited), neutral and sad; rows of other emotions have none. There is
no official split but five folds: one session is the test, the next one the validation.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .checks import Report
from .reading import clean_text, messages, read_text
from .row import Row, make_row

_EMOTIONS = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
_LABEL = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\w+)\t(\w+)\t", re.MULTILINE)
_TURN = re.compile(r"^(Ses0[1-5][FM]_\w+_([FM])\d+)\w* \[[\d.-]+\]: (.*)$", re.MULTILINE)


def read(root: Path, report: Report, fold: int = 1) -> Iterator[Row]:
    """Rows of all turns with an emotion label; only the four usual emotions are kept.

    Args:
        fold: the session that is the test, 1 to 5.
    """
    if fold not in range(1, 6):
        raise ValueError(f"--fold {fold}: IEMOCAP has the sessions 1 to 5.")
    split = {fold: "test", fold % 5 + 1: "validation"}
    folders = {session: root / f"Session{session}" for session in range(1, 6)}
    if not any(folder.is_dir() for folder in folders.values()):
        raise FileNotFoundError(f"{root} holds no Session1 ... Session5.")
    for session, folder in folders.items():
        for path in sorted((folder / "dialog" / "transcriptions").glob("Ses*.txt")):
            labelled = folder / "dialog" / "EmoEvaluation" / path.name
            if not labelled.is_file():
                report.add("dialogue without labels", str(path))
                continue
            labels = dict(_LABEL.findall(read_text(labelled)))
            known = {"corpus": "iemocap", "split": split.get(session, "train"), "dialogue": path.stem}
            earlier: list[tuple[str, str]] = []
            for turn, (name, actor, text) in enumerate(_TURN.findall(read_text(path))):
                text = clean_text(text)
                if name not in labels:
                    report.add("turn without a label, kept as history", name)
                else:
                    if labels[name] not in _EMOTIONS:
                        report.add("emotion outside the usual four, left out of the row", f"{name}: {labels[name]}")
                    known |= {"id": name, "turn": turn, "transcript": text, "emotion": _EMOTIONS.get(labels[name])}
                    known |= {"speaker": f"iemocap_{session}{actor}", "gender": {"F": "female", "M": "male"}[actor]}
                    audio = str(folder / "sentences" / "wav" / path.stem / f"{name}.wav")
                    yield make_row(**known, audio=audio, history=messages(earlier, actor))
                if text:
                    earlier.append((actor, text))
