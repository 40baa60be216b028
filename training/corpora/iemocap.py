"""IEMOCAP (https://sail.usc.edu/iemocap, on request): five sessions of two actors each, acted and improvised dialogues.

    Session{n}/dialog/EmoEvaluation/{dialogue}.txt    the label that the listeners agreed on
    Session{n}/dialog/transcriptions/{dialogue}.txt    Session{n}/sentences/wav/{dialogue}/{utterance}.wav

The usual task has four emotions: angry, happy (with excited), neutral, sad; other turns have none. There is no official
split: five folds, each with one session as the test and the next one as the validation.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .schema import Report, clean_text, decode, make_row, messages

_EMOTIONS = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
_LABEL = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\w+)\t(\w+)\t", re.MULTILINE)
_TURN = re.compile(r"^(Ses0[1-5][FM]_\w+_([FM])\d+)\w* \[[\d.-]+\]: (.*)$", re.MULTILINE)
SESSIONS = (1, 2, 3, 4, 5)


def read(root: Path, report: Report, fold: int = 1) -> Iterator[dict]:
    """Rows of every turn that has a label of any emotion; the four usual ones are kept.

    Args:
        fold: the session that is the test, 1 to 5.

    Raises:
        ValueError: no such fold.
        FileNotFoundError: no session of the corpus is there.
    """
    if fold not in SESSIONS:
        raise ValueError(f"--fold {fold}: IEMOCAP has the sessions 1 to 5.")
    split = {fold: "test", fold % 5 + 1: "validation"}
    sessions = [n for n in SESSIONS if (root / f"Session{n}").is_dir()]
    if not sessions:
        raise FileNotFoundError(f"{root} holds no Session1 ... Session5.")
    for session in sessions:
        folder = root / f"Session{session}"
        for path in sorted((folder / "dialog" / "transcriptions").glob("Ses*.txt")):
            labelled = folder / "dialog" / "EmoEvaluation" / path.name
            if not labelled.is_file():
                report.add("dialogue without labels", str(path))
                continue
            labels = dict(_LABEL.findall(read_text(labelled)))
            earlier: list[tuple[str, str]] = []
            for turn, (name, actor, text) in enumerate(_TURN.findall(read_text(path))):
                text = clean_text(text)
                if name not in labels:
                    report.add("turn without a label, kept as history", name)
                else:
                    if labels[name] not in _EMOTIONS:
                        report.add("emotion outside the usual four, left out of the row", f"{name}: {labels[name]}")
                    yield make_row(
                        id=name,
                        corpus="iemocap",
                        split=split.get(session, "train"),
                        audio=str(folder / "sentences" / "wav" / path.stem / f"{name}.wav"),
                        transcript=text or None,
                        speaker=f"iemocap_{session}{actor}",
                        gender={"F": "female", "M": "male"}[actor],
                        emotion=_EMOTIONS.get(labels[name]),
                        dialogue=path.stem,
                        turn=turn,
                        history=messages(earlier, actor),
                    )
                if text:
                    earlier.append((actor, text))


def read_text(path: Path) -> str:
    """A text file, whatever its encoding."""
    return decode(path.read_text(encoding="utf-8", errors="surrogateescape"))
