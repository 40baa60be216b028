"""Turns replies into records: one JSON object for each scored reply, the lines of SUITE.jsonl."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..corpora.row import Row
from ..files import write_text
from ..parsing import parse_transcript, score, word_errors
from ..text import nothing_said
from .benchmarks import BENCHMARKS, score_answer
from .suites import EQUAL, SUITES
from .systems import Query

# Keys of every record: suite, condition, task, corpus, id, speaker, gender, audio, reply; `prompt` if the LLM was asked,
# `subset` if the corpus names one.
# Words add said, heard, errors, words; labels add label, parsed, choices; other scores add value and wanted (or judge and
# metric). The swap test adds `other`, the score against the other clip; the answer loss adds answer_nll, answer_tokens.
Record = dict[str, Any]
SILENCE = "no speech, nothing heard"  # task of clips without words: silence, noise, music


def record_of(row: Row, suite: str, condition: str, task: str, reply: str, **more: Any) -> Record:
    """The keys of every record, and more."""
    known = {"suite": suite, "condition": condition, "task": task, "corpus": row.corpus, "id": row.id}
    known |= {"speaker": row.speaker or row.id, "gender": row.gender, "audio": row.audio}
    known |= {"subset": row.subset} if row.subset else {}
    return known | {"reply": reply} | more


def record(query: Query, reply: str, prompt: str) -> Record:
    """The record of a reply."""
    row, voice, sample, task = query.row, query.voice, query.sample, query.sample.task
    owner, other = (voice, row) if sample.choices else (row, voice)  # an attribute is the voice's, words are the row's
    condition, equal, _ = query.condition.partition(EQUAL)
    found = record_of(owner, query.suite, condition, task + equal, reply, prompt=prompt)
    found["speaker"] = owner.speaker or owner.dialogue or owner.id
    if query.condition == "swap":
        found["other"] = {"id": other.id, "label": other.label(task), "transcript": other.transcript}
        if task == "asr":
            errors, words = word_errors(other.transcript or "", parse_transcript(reply))
            found["other"] |= {"errors": errors, "words": words}
    if task in ("fact", "instruction"):
        kept = re.search(sample.target, reply, re.IGNORECASE if task == "fact" else 0)
        return found | {"value": float(bool(kept)), "wanted": sample.target}
    if query.suite in BENCHMARKS:
        return found | score_answer(query.suite, sample, reply)
    return found | score(sample, reply, row.transcript)


def direct(
    rows: list[Row], heard: list[dict], suite: str, condition: str = "heard", only: str | None = None
) -> Iterator[Record]:
    """Records of what the adapters hear before the LLM.

    Args:
        heard: for each row its words (`heard`) and probabilities of labels (`attributes`), as `Checkpoint.hear` returns.
        only: the one attribute that is scored, of clips at equal loudness. None: all.
    """
    for row, item in zip(rows, heard, strict=True):
        if suite == "asr" and item["heard"] is not None:
            yield record_of(row, suite, condition, **_words(row.transcript or "", item["heard"]))
        if suite != "attributes" or item["attributes"] is None:
            continue
        for task, probabilities in item["attributes"].items():
            if row.label(task) in probabilities and only in (None, task):
                best = max(probabilities, key=probabilities.get)
                found = record_of(row, suite, condition, task + (EQUAL if only else ""), best, label=row.label(task))
                yield found | {"parsed": best, "confidence": probabilities[best], "choices": sorted(probabilities)}


def _words(said: str, heard: str) -> Record:
    """Score of heard words; where nobody speaks, whether nothing was heard."""
    if nothing_said(said):
        return {"task": SILENCE, "reply": heard.strip(), "value": float(not heard.strip()), "wanted": said}
    errors, words = word_errors(said, heard)
    return {"task": "asr", "said": said, "heard": heard, "reply": heard, "errors": errors, "words": words}


def write_records(folder: Path, suite: str, records: list[Record]) -> None:
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in records)
    write_text(folder / f"{suite}.jsonl", "".join(lines))


def read_records(folder: str | Path) -> list[Record]:
    """All records of a finished evaluation.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    paths = [path for suite in SUITES if (path := Path(folder) / f"{suite}.jsonl").is_file()]
    if not paths or not (Path(folder) / "report.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished evaluation (report.json and one .jsonl a suite).")
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").split("\n"))
    return [json.loads(line) for line in lines if line]
