"""One evaluation: suites -> queries -> replies -> records -> report. An interrupted run goes on.

OUT/setup.json     what was evaluated on what; a folder belongs to one setup
OUT/replies.jsonl  the journal: one [key, reply] a line, answer losses too; judges.jsonl is the judges' journal
OUT/SUITE.jsonl    one record for each sample: prompt, raw reply, parsed label
OUT/report.json    OUT/report.html    OUT/disentanglement.png
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from ..attributes import Thresholds, relabel
from ..corpora.row import Row
from ..corpora.table import read_table
from ..files import Journal, read_json, write_json
from ..labels import ATTRIBUTES
from ..tasks import label_sets
from .benchmarks import BENCHMARKS, Question, identity_of, judge_answers
from .context import ASSET, EvaluationContext, piper_speaker, whisper_transcriber
from .figures import agreement, confusions_of, figures_of, warnings_of
from .judges import CITED, SYSTEM, judge, load_judge
from .probes import FROZEN, probe, told_apart
from .records import Record, direct, read_records, record, write_records
from .report import Report, write_report
from .suites import EQUAL, SUITES, at_equal_loudness
from .systems import Checkpoint, Query, System, load_system
from .tables import paper_tables

GROUP = 32  # replies that the journal gets at once


def evaluate(
    name: str,
    tables: list[str],
    out: str | Path,
    suites: Iterable[str] = ("all",),
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    judges: Iterable[str] = (),
    wordings: Iterable[str] = CITED,
    beside: Iterable[str | Path] = (),
    questions: Sequence[Question] = (),
    system: System | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Report:
    """Runs suites, writes the report and returns the content of report.json.

    Args:
        name: checkpoint (folder or Hub id), Qwen2-Audio, or a `.jsonl` of replies.
        tables: of `dual-slm corpus`. Rows of `split` are asked; probes are fitted to those of `train`.
        out: folder of the report. An interrupted evaluation in it goes on; another evaluation is refused.
        limit: rows of each corpus and task, for ASR of each subset. `hearing` ignores it unless the LLM has to be asked.
        judges: of the suite `conversation`; see `judges.load_judge`.
        wordings: of the judges' prompts: keys of `judges` in assets/evaluation.yaml.
        beside: folders of finished evaluations of other systems. The judges score their replies to the same turns too.
        questions: of public benchmarks, see `benchmarks.read_benchmarks`. With them, `tables` may be empty.
        system: is evaluated instead of the system that `name` loads.
        dtype, device, trust_remote_code: of the models that are loaded.

    Raises:
        ValueError: an unknown suite or wording, tables without rows of the split, or a folder of another evaluation.
        FileNotFoundError: a folder of `beside` holds no finished evaluation.
    """
    start, out, judges, wordings = time.perf_counter(), Path(out), list(judges), list(wordings)
    chosen = suites_of(suites, tables, questions)
    if unknown := [wording for wording in wordings if wording not in ASSET["judges"]]:
        raise ValueError(f"no wording {unknown[0]!r} of judges; there are {', '.join(ASSET['judges'])}.")
    others, table = list(_other_systems(list(beside))), read_table(*tables) if tables else []
    system = system or load_system(name, out / "features", dtype, device, trust_remote_code)
    setup = _setup(name, system, tables, split, limit, seed)
    setup["questions"] = identity_of(questions)
    journal = Journal(out / "replies.jsonl")
    context = make_context(system, table, setup, out, journal, questions)
    if not context.rows and not questions:
        raise ValueError(f"{', '.join(tables)}: no row of the split {split!r}.")
    _keep_to(out, setup)
    records: list[Record] = []
    for suite in chosen:
        queries = SUITES[suite](context)
        print(f"{suite}: {len(queries):,} queries", flush=True)
        found = _run_suite(suite, system, queries, context, journal)
        asked, rows = _with_others(suite, found, others, context), _rows_of(queries)
        for each in judges if suite in ("conversation", "voicebench") else ():
            answers, who = Journal(out / "judges.jsonl"), load_judge(each, dtype, device)
            if suite == "conversation":
                found += judge(who, asked, rows, answers, seed, wordings)
            else:
                found += judge_answers(who, asked, questions, answers)
        if suite == "conversation" and not judges:
            context.notes.append("conversation: no --judge was named, so the replies are not scored.")
        if not found:
            context.notes.append(f"{suite}: no row of {', '.join(setup['data'])} has anything to ask.")
        write_records(out, suite, found)
        records += found
    figures = figures_of(records)
    report = {
        "setup": setup | {"date": date.today().isoformat()},
        "suites": chosen,
        "warnings": warnings_of(records, figures),
        "notes": list(dict.fromkeys(context.notes)),
        "tables": [table._asdict() for table in paper_tables(figures)],
        "figures": figures,
        "confusions": confusions_of(records),
        "agreement": agreement(records),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_report(out, report, records)
    return report


def _setup(name: str, system: System, tables: list[str], split: str, limit: int | None, seed: int) -> dict[str, Any]:
    """What a folder of results belongs to."""
    names = [Path(table).name for table in tables]
    names = names if len(set(names)) == len(names) else tables
    local = [Path(name)] if Path(name).is_file() else [Path(name, "config.json"), Path(name, "model.safetensors")]
    config = system.model.config if isinstance(system, Checkpoint) else None
    return {
        "system": name,
        "fingerprint": _digest(*local) if all(path.is_file() for path in local) else None,  # None: a name on the Hub
        "split": split,
        "seed": seed,
        "limit": limit,
        "data": {short: _digest(Path(table)) for short, table in zip(names, tables, strict=True)},
        "asset": ASSET["version"],
        "thresholds": getattr(config, "attribute_thresholds", None),
    }


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def suites_of(suites: Iterable[str], tables: Sequence, questions: Sequence) -> list[str]:
    """The suites of these names. `all` are those that have data: tables, questions of benchmarks, or both."""
    chosen = list(dict.fromkeys(suites))
    if unknown := [suite for suite in chosen if suite not in (*SUITES, "all")]:
        raise ValueError(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)} and all.")
    asked = {question.suite for question in questions}
    return [s for s in SUITES if (s in asked if s in BENCHMARKS else tables)] if "all" in chosen else chosen


def make_context(
    system: System,
    table: Iterable[Row],
    setup: dict[str, Any],
    out: Path,
    journal: Journal,
    questions: Sequence[Question] = (),
) -> EvaluationContext:
    """What the suites draw from, for a system and the `split`, `seed`, `limit` and `thresholds` of a setup."""
    borders = Thresholds(**setup["thresholds"]) if setup["thresholds"] else None
    rows = [relabel(row, borders) for row in table]
    context = EvaluationContext(
        [row for row in rows if row.split == setup["split"] and not row.voice_only],
        label_sets(rows),
        system.conditions,
        speak=piper_speaker(out / "facts", setup["seed"]),
        limit=setup["limit"],
        seed=setup["seed"],
        train=[row for row in rows if row.split == "train"],
        questions=questions,
    )
    if isinstance(system, Checkpoint):
        context.transcribe = whisper_transcriber(system, journal)
        context.words_as_text = system.words_as_text
        context.facts = tuple(system.model.config.prompt_facts or ())
        if made_for := system.processor.attribute_questions:
            context.tasks = tuple(made_for)
            context.notes.append(f"the checkpoint was made for {', '.join(context.tasks)}; other tasks are not asked.")
    return context


def _keep_to(out: Path, setup: dict[str, Any]) -> None:
    """Writes the setup, or refuses a folder with another one; only `limit` may change."""
    path = out / "setup.json"
    setup = json.loads(json.dumps(setup))
    known = read_json(path) if path.is_file() else setup
    other = [name for name in setup if name != "limit" and known.get(name) != setup[name]]
    if other:
        shown = "; ".join(f"{n}: {known.get(n)!r} there, {setup[n]!r} here" for n in other[:3])
        raise ValueError(f"{out} holds another evaluation ({shown}). Name another --out.")
    write_json(path, setup)


def _other_systems(folders: list[str | Path]) -> Iterator[Record]:
    """Replies of finished evaluations in the suite `conversation`, under the condition `system: FOLDER`."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--beside names {', '.join(names)}: two folders of one name. Rename one.")
    for folder, name in zip(folders, names, strict=True):
        for entry in read_records(folder):
            if entry["suite"] == "conversation" and entry["condition"] == "P&L" and "judge" not in entry:
                yield entry | {"condition": SYSTEM + name}


def _with_others(suite: str, found: list[Record], others: list[Record], context: EvaluationContext) -> list[Record]:
    """The records, and other systems' replies to the same turns of conversations. A note counts what is missing."""
    if suite != "conversation":
        return list(found)
    turns = {(entry["corpus"], entry["id"]) for entry in found if entry["condition"] == "P&L"}
    for condition in dict.fromkeys(entry["condition"] for entry in others):
        answered = {(entry["corpus"], entry["id"]) for entry in others if entry["condition"] == condition}
        if missing := len(turns - answered):
            context.notes.append(f"conversation: {condition} has no reply to {missing:,} of {len(turns):,} turns.")
    return found + [entry for entry in others if (entry["corpus"], entry["id"]) in turns]


def _run_suite(
    suite: str, system: System, queries: list[Query], context: EvaluationContext, journal: Journal
) -> list[Record]:
    """Records of the replies, then of what is measured beside them."""
    found = _answer(system, queries, journal)
    if len(found) < len(queries):
        context.notes.append(f"{suite}: {len(queries) - len(found):,} of {len(queries):,} have no reply.")
    if suite == "style":
        found = list(told_apart(found, _rows_of(queries)))
    if isinstance(system, Checkpoint):
        found += _hearing(system, context) if suite == "hearing" else _beside(system, suite, queries, context)
    return found


def _rows_of(queries: list[Query]) -> dict[tuple[str, str], Row]:
    return {query.row.key: query.row for query in queries}


def _answer(system: System, queries: list[Query], journal: Journal) -> list[Record]:
    """Records of all queries that get a reply; a reply or loss in the journal is not asked for again."""
    _ask(system, system.reply, queries, journal)
    if isinstance(system, Checkpoint):  # the losses of the right answers, where a task has one: words and labels
        _ask(system, system.losses, [q for q in queries if q.sample.task in ("asr", *ATTRIBUTES)], journal, "loss/")
    found = []
    for query in queries:
        if query.key in journal.values:
            entry = record(query, journal.values[query.key], system.prompt(query))
            if (loss := journal.values.get(f"loss/{query.key}")) is not None:
                entry["answer_nll"], entry["answer_tokens"] = loss
            found.append(entry)
    return found


def _ask(system: System, method: Callable, queries: list[Query], journal: Journal, prefix: str = "") -> None:
    """Adds what a method of the system yields for each query to the journal, a group at a time."""
    todo = {prefix + query.key: query for query in queries if prefix + query.key not in journal.values}
    if todo:
        queries = list(todo.values())
        system.prepare([clip for query in queries for clip in (query.row, query.voice) if clip.audio])
        found = ((prefix + query.key, value) for query, value in method(queries))
        while group := dict(itertools.islice(found, GROUP)):
            journal.add(group)


def _beside(system: Checkpoint, suite: str, queries: list[Query], context: EvaluationContext) -> list[Record]:
    """Records of the clips that a suite asked about under P&L."""
    clips = list(_rows_of([q for q in queries if q.row.audio and q.condition == "P&L"]).values())
    level = list(_rows_of([q for q in queries if q.condition == "P&L" + EQUAL]).values())
    found: list[Record] = []
    if suite in ("asr", "attributes"):
        found += direct(clips, system.hear(clips), suite)
        found += direct(level, system.hear(level), suite, only="emotion")
    if suite == "asr":
        silent = context.silent_clips() if "asr" in context.tasks and not system.words_as_text else []
        system.prepare(silent)
        found += direct(silent, system.hear(silent), suite)
        found += _by_whisper([*clips, *silent], context)
    if suite in ("attributes", "disentanglement") and clips:
        train = context.training_clips(clips)
        if not train:
            context.notes.append(f"{suite}: the tables have no training rows of these corpora, so no linear probes.")
            return found
        system.prepare(train)
        branches = ["P branch"] if system.words_as_text else ["P branch", "L branch"]
        found += probe(system, train, [*clips, *level], suite, FROZEN if suite == "attributes" else branches)
    return found


def _by_whisper(rows: list[Row], context: EvaluationContext) -> Iterator[Record]:
    """Records of the words by Whisper's own decoder, if the encoder has one."""
    if context.transcribe is None:
        return iter(())
    return direct(rows, [{"heard": context.transcribe(row)} for row in rows], "asr", "Whisper's decoder")


def _hearing(system: Checkpoint, context: EvaluationContext) -> list[Record]:
    """Records of the suite `hearing`, which asks about every clip."""
    if not system.processor.attribute_questions:  # else one question to the LLM for each clip and label is slow
        context = replace(context, limit=None)
    known = [row for name in ATTRIBUTES if name in context.tasks for row in context.clips(name)]
    voices = list({row.key: row for row in known}.values())
    level = [at_equal_loudness(row) for row in voices if row.emotion]
    words = [] if system.words_as_text else context.clips("asr") + context.silent_clips()
    train = context.training_clips(voices)
    system.prepare(voices + level + words + train)
    found = [*direct(words, system.hear(words), "asr"), *_by_whisper(words, context)]
    found += direct(voices, system.hear(voices), "attributes")
    found += direct(level, system.hear(level), "attributes", only="emotion")
    found += probe(system, train, voices + level, "hearing", FROZEN if train else [])
    return [entry | {"suite": "hearing"} for entry in found]
