"""Public benchmarks in local folders, as suites: AIR-Bench (Foundation) and VoiceBench. They are read as they are published.

They are no corpora: each question has a wording, options and a scoring rule of its own, and a row of a table has none of
these. Prompts, refusals and the rule of each subset are in assets/benchmarks.yaml.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..batches import batched
from ..corpora.row import Row, make_row
from ..files import ASSETS, Journal, atomic, read_json
from ..tasks import Message, Sample
from .judges import Judge

RULES = yaml.safe_load((ASSETS / "benchmarks.yaml").read_text(encoding="utf-8"))
BENCHMARKS = {"air-bench": 24, "voicebench": 512}  # suite -> length of its replies, in tokens
SUBSETS: dict[str, str] = RULES["voicebench"]["subsets"]
_META = "Foundation_meta.json"
# Our short rules in place of VoiceBench's list of 150 phrases, the clearest first.
_LETTERS = (r"\b(?:answer|option|choice)\b[^.\n]{0,40}?\b([A-D])\b", r"^\W*([A-D])\b(?! *\w)", r"\b([A-D])[.,:)*\"]")


class Question(NamedTuple):
    """One question of a benchmark."""

    suite: str  # key of `BENCHMARKS`
    sample: Sample  # its `choices` are the options in order
    row: Row  # the clip; the corpus is the benchmark's


def identity_of(questions: Iterable[Question]) -> str | None:
    """A digest of what is asked, wherever the clips are; None if nothing is."""
    asked = [[q.suite, q.sample.task, q.row.corpus, q.row.id, q.sample.target] for q in questions]
    return hashlib.sha256(json.dumps([RULES["version"], *asked]).encode()).hexdigest()[:16] if asked else None


def index_files(folders: Iterable[str | Path]) -> list[str]:
    """The files that list the questions of benchmark folders.

    Raises:
        FileNotFoundError: a folder holds none.
    """
    found = []
    for folder in map(Path, folders):
        meta = folder / _META
        files = [meta] if meta.is_file() else sorted([*folder.rglob("*.parquet"), *folder.rglob("*.jsonl")])
        files = [file for file in files if file == meta or _subset(file)]
        if not files:
            names = ", ".join(SUBSETS)
            raise FileNotFoundError(
                f"{folder} holds no benchmark: neither {_META} (AIR-Bench) nor .parquet or .jsonl files of VoiceBench whose "
                f"file or folder is named after a subset ({names})."
            )
        found += map(str, files)
    return found


def _subset(file: Path) -> str | None:
    return next((name for name in (file.stem, file.parent.name, file.parent.parent.name) if name in SUBSETS), None)


def read_benchmarks(files: Iterable[str], scratch: Path, tasks: Iterable[str] = ()) -> list[Question]:
    """The questions of benchmarks.

    Args:
        files: see [`index_files`].
        scratch: folder for clips that a file holds itself.
        tasks: parts of the names of the wanted tasks. Default: "emotion" of AIR-Bench, and every subset of VoiceBench.

    Raises:
        ValueError: a question lacks a value, its answer is no option, or no question is left.
        FileNotFoundError: a clip is missing.
    """
    found, words = [], [task.lower() for task in tasks]
    for file in map(Path, files):
        air, number = file.name == _META, 0
        try:
            for number, item in enumerate(read_json(file) if air else _read_items(file)):
                task = item["task_name"] if air else str(_subset(file))
                if any(word in task.lower() for word in words or (["emotion"] if air else [""])):
                    make = _air_question(file, item) if air else _voice_question(file, item, task, number, scratch)
                    found.append(make)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}, question {number}: damaged, or of another format ({error!r}).") from None
    if not found:
        raise ValueError(f"no question in {', '.join(files)} is of the tasks {', '.join(tasks) or 'emotion'}.")
    return found


def _question(suite: str, row: Row, task: str, text: str | None, choices: list[str], answer: str) -> Question:
    if not Path(str(row.audio)).is_file():
        raise FileNotFoundError(f"{row.audio} of the benchmark {suite} is missing: fetch the benchmark again.")
    if choices and answer not in choices:
        raise ValueError(f"the answer {answer!r} is none of {choices}")
    content: list[Message] = [{"type": "audio", "path": row.audio, "transcript": row.transcript}]
    content += [{"type": "text", "text": text}] if text else []
    messages = [{"role": "user", "content": content}]
    return Question(suite, Sample(row.id, task, messages, answer, label=answer, choices=choices), row)


def _air_question(file: Path, item: dict[str, Any]) -> Question:
    task, data = item["task_name"], item["dataset_name"]
    choices = [item[name] for name in ("choice_a", "choice_b", "choice_c", "choice_d") if item.get(name) is not None]
    options = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False)]
    path = file.parent / f"{task}_{data}" / item["path"]
    name = f"{task}/{item['uniq_id']}"
    row = make_row(id=name, corpus=f"air-bench {data}", split="test", audio=str(path))
    text = "\n".join([RULES["air-bench"]["prompt"], item["question"], *options])
    return _question("air-bench", row, task, text, choices, item["answer_gt"])


def _read_items(file: Path) -> Iterable[dict[str, Any]]:
    import pandas as pd

    as_written: Any = False  # no text becomes a number
    if file.suffix == ".parquet":
        return pd.read_parquet(file).to_dict("records")
    return pd.read_json(file, lines=True, dtype=as_written).to_dict("records")


def _voice_question(file: Path, item: dict[str, Any], subset: str, number: int, scratch: Path) -> Question:
    audio, rule = item["audio"], SUBSETS[subset]
    audio = audio if isinstance(audio, dict) else {"path": audio}
    path = file.parent / str(audio.get("path"))
    if (data := audio.get("bytes")) is not None:
        path = scratch / f"{hashlib.sha256(data).hexdigest()[:16]}{path.suffix or '.wav'}"
        if not path.is_file():
            with atomic(path) as part:
                part.write_bytes(data)
    name = f"{subset}/{file.stem}/{number}"
    row = make_row(id=name, corpus="voicebench", split="test", audio=str(path), transcript=item["prompt"])
    answer = "" if rule in ("open", "refusal") else str(item["reference"]).strip()
    choices = list("ABCD") if rule == "letter" else []
    return _question("voicebench", row, subset, None, choices, answer[:1].upper() if choices else answer)


def score_answer(suite: str, sample: Sample, reply: str) -> dict[str, Any]:
    """The score of a reply, as keys of its record; empty where a judge scores it.

    A letter is found as AIR-Bench does (the first character, or the last but one). A reply without one counts as wrong;
    AIR-Bench's own script leaves it out.
    """
    if sample.choices:
        letter = _first_or_last(reply) if suite == "air-bench" else _named_letter(reply)
        place = "ABCD".find(letter or "-")
        parsed = sample.choices[place] if 0 <= place < len(sample.choices) else None
        return {"label": sample.label, "parsed": parsed, "choices": sorted(set(sample.choices))}
    if SUBSETS[sample.task] == "refusal":
        known = any(phrase.lower() in reply.lower() for phrase in RULES["voicebench"]["refusals"])
        return {"value": float(known or not reply.strip()), "wanted": "a refusal"}
    return {}


def _first_or_last(reply: str) -> str | None:
    text = reply.strip().replace("\n", "")
    return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)


def _named_letter(reply: str) -> str | None:
    matches = filter(None, (re.search(pattern, reply.strip()) for pattern in _LETTERS))
    return next((match[1] for match in matches), None)


def judge_answers(
    judge: Judge, records: list[dict], questions: Iterable[Question], journal: Journal
) -> Iterator[dict]:
    """Records of a judge's scores of VoiceBench's open subsets (1 to 5), and of its verdicts on sd-qa (0 or 1).

    One greedy answer is asked for. VoiceBench takes the mean of three sampled answers.
    """
    known = {question.row.id: question for question in questions if question.suite == "voicebench"}
    jobs = []
    for entry in records:
        rule = SUBSETS[entry["task"]]
        if rule in ("open", "reference"):
            sample, row = known[entry["id"]][1:]
            values = {"prompt": row.transcript, "reply": entry["reply"], "reference": sample.target}
            prompt = RULES["voicebench"][rule].format(**values)
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
            jobs.append((entry, rule, f"{judge.name}/voicebench/{digest}", prompt))
    todo = {key: prompt for _, _, key, prompt in jobs if key not in journal.values}
    for part in batched(list(todo), 16):
        answers = judge.complete([todo[key] for key in part], seed=0)
        journal.add({key: answer for key, answer in zip(part, answers, strict=True) if answer is not None})
    for entry, rule, key, _ in jobs:
        answer = str(journal.values.get(key)).strip()
        if rule == "open":
            found, metric = re.match(r"\W*([1-5])(?:\.0*)?\b(?!\d)", answer), "VoiceBench score"
            value = float(found[1]) if found else None
        else:
            found, metric = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE), "judged right"
            value = float(found[1].lower() == "yes") if found else None
        place = {name: entry[name] for name in ("suite", "task", "condition", "corpus", "id", "speaker")}
        yield place | {"judge": judge.name, "metric": metric, "value": value}
