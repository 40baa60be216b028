"""What the tests of the evaluation share: a table of tones, scripted systems, and a small checkpoint that was evaluated."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import soundfile

from conftest import tone
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.evaluation.systems import CONDITIONS
from dual_slm.training.files import ASSETS
from dual_slm.training.parsing import normalizer

EMOTIONS = ("neutral", "happy", "sad")
LINES = (ASSETS / "sentences.txt").read_text().splitlines()
SENTENCES = [line for line in LINES if line == normalizer()(line)][:12]  # without numbers
WORDS = sum(len(sentence.split()) for sentence in SENTENCES)


def table(folder: Path) -> Path:
    """Two corpora with the same ids: `read` has varied sentences, `acted` has two sentences with emotions."""
    rows = []
    for n in range(18):
        split, seconds, audio = "train" if n < 6 else "test", 0.5 + n % 6 / 10, str(folder / f"{n % 6}.wav")
        soundfile.write(audio, tone(seconds, n % 6), 16_000)
        known = {"id": str(n), "split": split, "audio": audio, "duration": seconds}
        known["gender"] = ("female", "male")[n % 2]
        rows.append(make_row(corpus="read", speaker=f"r {split} {n % 4}", transcript=SENTENCES[n % 12], **known))
        known |= {"transcript": f"{('kids', 'dogs')[n % 2]} are by the door", "emotion": EMOTIONS[n % 3]}
        rows.append(make_row(corpus="acted", speaker=f"a {split} {n % 4}", **known))
    write_table(rows, folder / "t.parquet")
    return folder / "t.parquet"


def records_of(folder: Path, suite: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{suite}.jsonl").read_text().splitlines()]


def figure(result: dict, *place: str) -> dict:
    """By suite, corpus, task, condition and metric."""
    names = ("suite", "corpus", "task", "condition", "metric")
    (found,) = (f for f in result["figures"] if tuple(f[n] for n in names) == place)
    return found


# ---- scripted systems


def system_of(answer) -> SimpleNamespace:
    """A system that knows what it is asked and replies by a function of it."""
    ask = {"prepare": lambda rows: None, "prompt": lambda query: "(prompt)"}
    return SimpleNamespace(
        name="scripted", conditions=tuple(CONDITIONS), reply=lambda qs: ((q, answer(q)) for q in qs), **ask
    )


def honest(query):
    """Hears all that each branch is given."""
    paralinguistic, linguistic = query.sources()
    if query.sample.task == "asr":
        return "I hear no words." if linguistic == "none" else query.row.transcript
    return f"It is {query.voice.label(query.sample.task)}." if paralinguistic == "speech" else "I cannot tell."


def exchanged(query):
    """Takes the words from the branch of the voice, and the voice from the branch of the words."""
    paralinguistic, linguistic = query.sources()
    if query.sample.task == "asr":
        return query.voice.transcript if paralinguistic == "speech" else "I hear no words."
    return f"It is {query.row.label(query.sample.task)}." if linguistic == "speech" else "I cannot tell."


def shuffled(query):
    draw = random.Random(query.key)
    return draw.choice(SENTENCES if query.sample.task == "asr" else query.sample.choices)


def slipping(query):
    """Honest, but for one word more in three clips, and the wrong gender of three voices."""
    slips = query.condition == "P&L" and query.row.corpus == "read" and query.row.id in ("6", "7", "8")
    if not slips or query.sample.task not in ("asr", "gender"):
        return honest(query)
    return f"{honest(query)} indeed" if query.sample.task == "asr" else "male" if "fe" in honest(query) else "female"


ANSWERS = {"honest": honest, "exchanged": exchanged, "shuffled": shuffled, "slipping": slipping}
ANSWERS |= {"constant": lambda query: "It is sad.", "silent": lambda query: "I cannot tell."}


# ---- conversations for judges


def talks(count: int) -> tuple[list[dict], dict]:
    """Records of replies under two conditions that name the topic of their conversation, and its rows."""
    names = [str(n) for n in range(count)]
    rows = {("c", n): make_row(id=n, corpus="c", split="test", transcript=f"topic{n}!") for n in names}
    records = []
    for condition in ("P&L", "text"):
        for n in names:
            known = {"corpus": "c", "id": n, "speaker": n, "condition": condition}
            records.append(known | {"reply": f"{condition} replies to topic{n}!"})
    return records, rows
