"""DailyTalk (https://github.com/keonlee9420/DailyTalk, CC BY-SA 4.0): 2,541 spoken dialogues of two speakers.

    metadata.json    data/{dialogue}/{utterance}_{speaker}_d{dialogue}.wav, the words beside it in a .txt

If there is a `dailytalk_dialogs.jsonl`, it is read instead of `metadata.json`: one dialogue a line, with dialog_idx and
turns of basename, speaker, text, emotion. The corpus has no split: 5 % of the dialogues are validation, 5 % are test, by
a hash of their number. Both speakers are in all splits. Every turn is a row, so the table has all cuts of a dialogue at
its midpoints (paper, section IV-A).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..text import split_by
from .checks import Report
from .reading import clean_text, messages
from .row import Row, make_row

_GENDER = {"0": "male", "1": "female"}


class _Turn(NamedTuple):
    number: int
    name: str  # of the audio file
    speaker: str
    text: str
    emotion: str


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of all turns; "no emotion" is None. After a gap in the turns of a dialogue the history starts anew."""
    root = root / "dailytalk" if (root / "dailytalk").is_dir() else root
    for dialogue, turns in _dialogues(root):
        known = {"corpus": "dailytalk", "dialogue": str(dialogue), "split": split_by(f"dailytalk/{dialogue}")}
        earlier, expected = [], 0
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            if turn.number != expected:
                example = f"dialogue {dialogue}, turn {turn.number}"
                report.add("gap in a dialogue; the history starts after it", example)
                earlier = []
            expected = turn.number + 1
            response = None
            if following and following.number == expected and following.speaker != turn.speaker:
                response = following.text
            known |= {"id": turn.name, "turn": turn.number, "transcript": turn.text}
            known |= {"speaker": f"dailytalk_{turn.speaker}", "gender": _GENDER.get(turn.speaker)}
            yield make_row(
                **known,
                audio=str(root / "data" / str(dialogue) / f"{turn.name}.wav"),
                emotion=None if turn.emotion in ("no emotion", "none") else turn.emotion,
                history=messages(earlier, turn.speaker),
                response=response,
            )
            earlier.append((turn.speaker, turn.text))


def _dialogues(root: Path) -> Iterator[tuple[int, list[_Turn]]]:
    lines, metadata = root / "dailytalk_dialogs.jsonl", root / "metadata.json"
    if lines.is_file():
        with open(lines, encoding="utf-8") as file:
            for dialogue in (_parse(line, lines) for line in file):
                yield dialogue["dialog_idx"], [_turn_of_line(turn) for turn in dialogue["turns"]]
    elif metadata.is_file():
        dialogues = _parse(metadata.read_text(encoding="utf-8"), metadata)
        for key in sorted(dialogues, key=int):
            turns = dialogues[key]
            yield int(key), [_turn(metadata, key, int(number), turns[number]) for number in sorted(turns, key=int)]
    else:
        raise FileNotFoundError(f"{root} holds neither metadata.json nor dailytalk_dialogs.jsonl.")


def _turn_of_line(turn: dict) -> _Turn:
    number, name, speaker = turn["utterance_idx"], turn["basename"], str(turn["speaker"])
    return _Turn(number, name, speaker, clean_text(turn["text"]), turn["emotion"])


def _turn(metadata: Path, dialogue: str, number: int, turn: dict) -> _Turn:
    """A turn of `metadata.json`; the text file beside the audio, if there is one, tells its name and words."""
    beside = next((metadata.parent / "data" / dialogue).glob(f"{number}_*_d{dialogue}.txt"), None)
    for key in ("emotion",) if beside else ("emotion", "speaker", "text"):
        if key not in turn:
            lack = key if key == "emotion" else f"{key}, and no .txt file"
            place = f"{metadata}: dialogue {dialogue}, turn {number}"
            raise ValueError(f"{place} has no {lack}; it has {', '.join(turn)}.")
    if beside:
        name, text = beside.stem, beside.read_text(encoding="utf-8")
    else:
        name, text = f"{number}_{turn['speaker']}_d{dialogue}", turn["text"]
    return _Turn(number, name, name.split("_")[1], clean_text(text), turn["emotion"])


def _parse(text: str, path: Path) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}). Is it cut off?") from None
