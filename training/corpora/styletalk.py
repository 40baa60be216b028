"""StyleTalk (https://github.com/DanielLin94144/StyleTalk, MIT): the same words in several styles after the same context.

    train.csv  eval.csv    {diag_id}/c_{n}.wav (the spoken turn) and r_{n}.wav (what followed it), below any one folder

`eval.csv` is the test split. Voices are synthetic and not listed by the corpus.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .schema import Report, clean_text, make_row, messages, read_csv

_COLUMNS = ("diag_id", "context", "curr_audio_id", "res_audio_id", "curr_text", "res_text")
_COLUMNS += tuple(f"{turn}_{style}" for turn in ("curr", "res") for style in ("emotion", "speed", "volume"))
_ENERGY = {"quiet": "low", "normal": "normal", "loud": "high"}
_TURN = re.compile(r"(?:^|(?<=\s))([AB])\s*:\s*")


def read(root: Path, report: Report, role_reversed: bool = False) -> Iterator[dict]:
    """Rows of train and test. The spoken turn is the user's, what followed it is `response`.

    `role_reversed` adds the paper's second test (section IV-A): the roles of the test dialogues are exchanged, so that
    the user says what the corpus has as the answer, and the assistant has to lead on.
    """
    for name, split in (("train", "train"), ("eval", "test")):
        for record in read_csv(root / f"{name}.csv", _COLUMNS):
            pieces = _TURN.split(record["context"])
            context = [(who, clean_text(text)) for who, text in zip(pieces[1::2], pieces[2::2], strict=True)]
            if pieces[0].strip() or not context:
                report.add(
                    "context that does not begin with 'A :' or 'B :', read without its start", record["diag_id"]
                )
            speaker, text = re.fullmatch(r"(?:([AB])\s*:\s*)?(.*)", record["curr_text"], re.DOTALL).groups()
            # Whoever spoke last in the context is answered by the other one.
            speaker = speaker or ("B" if context and context[-1][0] == "A" else "A")
            if context and context[-1][0] == speaker:
                report.add("gap in a dialogue: two turns of one speaker in a row", record["curr_audio_id"])
            text, response = clean_text(text), clean_text(record["res_text"])
            yield _row(root, record, "curr", split, text, messages(context, speaker), response=response)
            if role_reversed and split == "test":
                other = "A" if speaker == "B" else "B"
                yield _row(root, record, "res", split, response, messages([*context, (speaker, text)], other))


def _row(root: Path, record: dict, turn: str, split: str, text: str, history: list[dict], **more) -> dict:
    audio = record[f"{turn}_audio_id"]
    folder = next((f for f in (root, root / "audio", root / split, root / "wav") if (f / audio).is_file()), root)
    return make_row(
        id=audio.removesuffix(".wav"),
        corpus="styletalk" if turn == "curr" else "styletalk_reversed",
        split=split,
        audio=str(folder / audio),
        transcript=text,
        emotion=record[f"{turn}_emotion"],
        tempo=record[f"{turn}_speed"],
        energy=_ENERGY.get(record[f"{turn}_volume"]),
        dialogue=record["diag_id"],
        turn=len(history),
        history=history,
        **more,
    )
