"""StyleTalk (https://github.com/DanielLin94144/StyleTalk, MIT): the same words in several styles after the same context.

    train.csv  eval.csv    {diag_id}/c_{n}.wav (the spoken turn) and r_{n}.wav (what followed it), below any one folder

`eval.csv` is the test split. The voices are synthetic; the corpus does not name them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .checks import Report
from .reading import clean_text, messages, read_csv
from .row import Message, Row, make_row

_COLUMNS = ("diag_id", "context", "curr_audio_id", "res_audio_id", "curr_text", "res_text")
_COLUMNS += tuple(f"{turn}_{style}" for turn in ("curr", "res") for style in ("emotion", "speed", "volume"))
_ENERGY = {"quiet": "low", "normal": "normal", "loud": "high"}
_TURN = re.compile(r"(?:^|(?<=\s))([AB])\s*:\s*")
_SPOKEN = re.compile(r"^(?:([AB])\s*:\s*)?(.*)", re.DOTALL)


def read(root: Path, report: Report, role_reversed: bool = False) -> Iterator[Row]:
    """Rows of train and test. The spoken turn is the user's; the turn that followed is `response`.

    Args:
        role_reversed: add the test dialogues with exchanged roles (paper, section IV-A). The user then says the corpus's
            answer, and the assistant continues.
    """
    for name, split in (("train", "train"), ("eval", "test")):
        for record in read_csv(root / f"{name}.csv", _COLUMNS):
            pieces = _TURN.split(record["context"])
            context = [(who, clean_text(text)) for who, text in zip(pieces[1::2], pieces[2::2], strict=True)]
            if pieces[0].strip() or not context:
                report.add("context without 'A :' or 'B :' at its start, which is left out", record["diag_id"])
            speaker, text = _SPOKEN.findall(record["curr_text"])[0]
            # Without a name, the speaker is the one who did not end the context.
            speaker = speaker or ("B" if context and context[-1][0] == "A" else "A")
            if context and context[-1][0] == speaker:
                report.add("gap in a dialogue: two turns of one speaker in a row", record["curr_audio_id"])
            text, response = clean_text(text), clean_text(record["res_text"])
            yield _row(root, record, "curr", split, text, messages(context, speaker), response)
            if role_reversed and split == "test":
                other = "A" if speaker == "B" else "B"
                yield _row(root, record, "res", split, response, messages([*context, (speaker, text)], other))


def _row(
    root: Path, record: dict, turn: str, split: str, text: str, history: list[Message], response: str | None = None
) -> Row:
    audio = record[f"{turn}_audio_id"]
    folder = next((f for f in (root, root / "audio", root / split, root / "wav") if (f / audio).is_file()), root)
    known = {"id": audio.removesuffix(".wav"), "split": split, "audio": str(folder / audio), "transcript": text}
    known |= {"emotion": record[f"{turn}_emotion"], "tempo": record[f"{turn}_speed"]}
    known |= {"dialogue": record["diag_id"], "turn": len(history), "history": history, "response": response}
    corpus = "styletalk" if turn == "curr" else "styletalk_reversed"
    return make_row(**known, corpus=corpus, energy=_ENERGY.get(record[f"{turn}_volume"]))
