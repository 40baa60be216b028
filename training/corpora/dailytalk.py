"""DailyTalk (https://github.com/keonlee9420/DailyTalk, CC BY-SA 4.0): 2,541 spoken dialogues of two speakers.

    metadata.json    data/{dialogue}/{utterance}_{speaker}_d{dialogue}.wav, the words beside it in a .txt

`dailytalk_dialogs.jsonl` (one dialogue a line: dialog_idx, turns of basename, speaker, text, emotion) is read in place
of `metadata.json` where it is there. The corpus has no split of its own: 5 % of the dialogues each are validation and
test, by a hash of their number; both speakers are in all of them. Every turn is a row, so that the paper's cuts of a
dialogue at its midpoints (section IV-A) are all in the table.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from .schema import Report, clean_text, make_row, messages, split_by

_GENDER = {"0": "male", "1": "female"}


def read(root: Path, report: Report) -> Iterator[dict]:
    """Rows of every turn; "no emotion" is null. Where the turns of a dialogue leave a gap, the history starts behind it."""
    root = root / "dailytalk" if (root / "dailytalk").is_dir() else root
    for dialogue, turns in _dialogues(root):
        split = split_by(f"dailytalk/{dialogue}")
        earlier, expected = [], 0
        for place, (number, name, speaker, text, emotion) in enumerate(turns):
            if number != expected:
                report.add("gap in a dialogue; the history starts behind it", f"dialogue {dialogue}, turn {number}")
                earlier = []
            following = turns[place + 1] if place + 1 < len(turns) else None
            answered = following is not None and following[0] == number + 1 and following[2] != speaker
            yield make_row(
                id=name,
                corpus="dailytalk",
                split=split,
                audio=str(root / "data" / str(dialogue) / f"{name}.wav"),
                transcript=text,
                speaker=f"dailytalk_{speaker}",
                gender=_GENDER.get(speaker),
                emotion=None if emotion in ("no emotion", "none") else emotion,
                dialogue=str(dialogue),
                turn=number,
                history=messages(earlier, speaker),
                response=following[3] if answered else None,
            )
            earlier.append((speaker, text))
            expected = number + 1


def _dialogues(root: Path) -> Iterator[tuple[int, list[tuple[int, str, str, str, str]]]]:
    """(number, [(place, file's name, speaker, text, emotion)]) of each dialogue."""
    lines, metadata = root / "dailytalk_dialogs.jsonl", root / "metadata.json"
    if lines.is_file():
        with open(lines, encoding="utf-8") as file:
            for line in file:
                record = _parse(line, lines)
                yield (
                    record["dialog_idx"],
                    [
                        (t["utterance_idx"], t["basename"], str(t["speaker"]), clean_text(t["text"]), t["emotion"])
                        for t in record["turns"]
                    ],
                )
        return
    if not metadata.is_file():
        raise FileNotFoundError(f"{root} holds neither metadata.json nor dailytalk_dialogs.jsonl.")
    dialogues = _parse(metadata.read_text(encoding="utf-8"), metadata)
    for key, dialogue in sorted(dialogues.items(), key=lambda item: int(item[0])):
        turns = []
        for number, about in sorted(((int(n), a) for n, a in dialogue.items()), key=lambda item: item[0]):
            if "emotion" not in about:
                raise ValueError(
                    f"{metadata}: dialogue {key}, turn {number} has no emotion; it has {', '.join(about)}."
                )
            beside = next(iter((root / "data" / key).glob(f"{number}_*_d{key}.txt")), None)
            if beside is not None:
                name, text = beside.stem, beside.read_text(encoding="utf-8")
            else:
                missing = [k for k in ("speaker", "text") if k not in about]
                if missing:
                    raise ValueError(
                        f"{metadata}: dialogue {key}, turn {number} has no {missing[0]}, and no .txt file."
                    )
                name, text = f"{number}_{about['speaker']}_d{key}", about["text"]
            turns.append((number, name, name.split("_")[1], clean_text(text), about["emotion"]))
        yield int(key), turns


def _parse(text: str, path: Path) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}). Is it cut off?") from None
