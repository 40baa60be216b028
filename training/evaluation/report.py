"""Records -> figures, warnings, report.json, report.html, a model card's metadata, and the comparison of two runs."""

import base64
import html
import io
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..backbones import ASSETS
from ..journal import write_json, write_text
from ..tasks import TASKS
from . import metrics

PERCENT = {"WER", "accuracy", "unweighted accuracy", "macro F1", "weighted F1", "unparsed", "majority class", "share"}
PERCENT |= {"names the other clip's label", "WER against the other clip", "calibration error"}
HEADLINE = ("WER", "accuracy", "share")
SUMMARY = (*HEADLINE, "unweighted accuracy", "answer loss")  # of comparisons and means over seeds
CARD_WARNINGS = 8
HEARING = ("P&L", "P only", "heard")  # conditions that must beat the most frequent label


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


def groups_of(records: list[dict]) -> dict[tuple, list[dict]]:
    """Records by (suite, corpus, task, condition, judge, metric); pitch within each gender as tasks of their own."""
    groups = defaultdict(list)
    for record in records:
        tasks = [record["task"]]
        if record["task"] == "pitch" and record.get("gender") and "label" in record:
            tasks.append(f"pitch, {record['gender']} voices")
        for task in tasks:
            place = (record["suite"], record["corpus"], task, record["condition"])
            groups[(*place, record.get("judge"), record.get("metric"))].append(record)
    return groups


def tallies_of(records: list[dict]) -> dict[str, tuple[np.ndarray, metrics.Figure]]:
    """Metric -> tallies by speaker (S, ...) and what is computed of their sum. Speakers in order of their names."""
    by_speaker = defaultdict(list)
    for record in records:
        by_speaker[record["speaker"]].append(record)
    speakers = [by_speaker[name] for name in sorted(by_speaker)]

    def stack(tally) -> np.ndarray:
        return np.stack([tally(group) for group in speakers])

    first, found = records[0], {}
    if "answer_nll" in first:  # of a token of the right answer
        found["answer loss"] = (
            stack(lambda g: np.array([sum(r["answer_nll"] for r in g), sum(r["answer_tokens"] for r in g)])),
            metrics.ratio,
        )
    if "words" in first:
        found["WER"] = (
            stack(lambda g: np.array([sum(r["errors"] for r in g), sum(r["words"] for r in g)])),
            metrics.ratio,
        )
        if "errors" in first.get("other", {}):
            count = stack(
                lambda g: np.array([sum(r["other"]["errors"] for r in g), sum(r["other"]["words"] for r in g)])
            )
            found["WER against the other clip"] = (count, metrics.ratio)
    elif "label" in first:
        labels = sorted({label for record in records for label in record["choices"]})
        tally = stack(lambda g: metrics.confusion([(r["label"], r["parsed"]) for r in g], labels))
        found |= {name: (tally, figure) for name, figure in metrics.LABEL_FIGURES.items()}
        found["majority class"] = (tally, metrics.majority)
        if first["corpus"] == "meld":
            found["weighted F1"] = (tally, metrics.weighted_f1)
        if "confidence" in first:
            bins = stack(lambda g: metrics.calibration([(r["confidence"], r["label"] == r["parsed"]) for r in g]))
            found["calibration error"] = (bins, metrics.calibration_error)
        if any(r.get("other", {}).get("label") for r in records):
            count = stack(
                lambda g: np.array(
                    [
                        sum(r["parsed"] == r["other"]["label"] is not None for r in g),
                        sum(r["other"]["label"] is not None for r in g),
                    ]
                )
            )
            found["names the other clip's label"] = (count, metrics.ratio)
    elif "value" in first:
        known = stack(lambda g: np.array([sum(r["value"] or 0.0 for r in g), sum(r["value"] is not None for r in g)]))
        found[first.get("metric") or "share"] = (known, metrics.ratio)
        if "judge" in first:
            lost = stack(lambda g: np.array([sum(r["value"] is None for r in g), len(g)]))
            found[f"{first['metric']}, unparsed"] = (lost, metrics.ratio)
    return found


def figures_of(records: list[dict]) -> list[dict]:
    """Every figure with its 95 % interval over speakers (None for one speaker)."""
    result = []
    for (suite, corpus, task, condition, judge, _), group in groups_of(records).items():
        for metric, (tally, figure) in tallies_of(group).items():
            value = float(figure(tally.sum(0)))
            low, high = metrics.bootstrap(tally, figure) or (None, None)
            place = {"suite": suite, "corpus": corpus, "task": task, "condition": condition, "judge": judge}
            counts = {"samples": len(group), "speakers": len(tally)}
            if np.isfinite(value):  # a judge of whom nothing could be read has no figure
                result.append(place | {"metric": metric, "value": value, "low": low, "high": high} | counts)
    return result


def confusions_of(records: list[dict]) -> list[dict]:
    """Confusion matrices of what is heard: conditions P&L and heard."""
    result = []
    for (suite, corpus, task, condition, _, _), group in groups_of(records).items():
        if (
            "label" in group[0]
            and suite in ("hearing", "attributes", "meld")
            and condition in ("P&L", "heard")
            and "," not in task
        ):
            labels = sorted({label for record in group for label in record["choices"]})
            matrix = metrics.confusion([(r["label"], r["parsed"]) for r in group], labels)
            place = {"suite": suite, "corpus": corpus, "task": task, "condition": condition}
            result.append(place | {"labels": labels, "matrix": matrix.tolist()})
    return result


def warnings_of(records: list[dict], figures: list[dict]) -> list[str]:
    """What a reader must know before believing a figure."""
    value = {(f["suite"], f["corpus"], f["task"], f["condition"], f["judge"], f["metric"]): f for f in figures}
    found = []

    def percent(number: float) -> str:
        return f"{100 * number:.1f} %"

    for (suite, corpus, task, condition, judge, metric), figure in value.items():
        where = f"{suite}, {task} on {corpus}, {condition}"
        if metric == "accuracy" and condition.split(",")[0] in HEARING and figure["samples"] >= 10:
            most = value[suite, corpus, task, condition, judge, "majority class"]["value"]
            low = figure["value"] if figure["low"] is None else figure["low"]
            if low <= most and "," not in task:
                found.append(
                    f"{where}: {percent(figure['value'])} is not above always naming the most frequent label "
                    f"({percent(most)})."
                )
            if (lost := value[suite, corpus, task, condition, judge, "unparsed"]["value"]) > 0.2:
                found.append(f"{where}: {percent(lost)} of the replies name no label, or several.")
        if metric == "WER" and condition in ("P&L", "L only", "heard") and figure["value"] >= 0.9:
            found.append(f"{where}: a word error rate of {percent(figure['value'])}; the words are not heard.")
        if metric == "WER" and condition == "P only":
            other = value.get((suite, corpus, task, "L only", None, "WER"))
            if (
                other
                and figure["samples"] >= 10
                and (1.0 if figure["high"] is None else figure["high"]) < other["value"]
            ):
                found.append(f"{where}: the words come through the paralinguistic branch (L only is worse).")
        if condition == "swap" and metric == "names the other clip's label":
            own = value[suite, corpus, task, "swap", None, "accuracy"]["value"]
            if figure["samples"] >= 10 and (figure["low"] or 0.0) > own:
                found.append(
                    f"{where}: the reply names the label of the clip whose words are heard ({percent(figure['value'])}) more "
                    f"often than that of the voice ({percent(own)}): the branches look exchanged."
                )
        if condition == "swap" and metric == "WER against the other clip":
            own = value[suite, corpus, task, "swap", None, "WER"]["value"]
            if figure["samples"] >= 10 and figure["value"] < own:
                found.append(f"{where}: the transcript follows the clip of the voice, not of the words.")
    for (suite, corpus, task, condition, *_), group in groups_of(records).items():
        if condition.split(",")[0] not in HEARING and (condition, task) != ("L only", "asr"):
            continue  # who hears nothing may well say the same each time
        if condition == "P only" and task == "asr":
            continue
        named = [r["parsed"] for r in group if r.get("parsed") is not None] if "label" in group[0] else []
        labels = {r["label"] for r in group} if named else set()
        if len(named) >= 10 and len(set(named)) == 1 and len(labels) > 1:
            found.append(f"{suite}, {task} on {corpus}, {condition}: every reply is {named[0]!r}.")
        replies = [r["reply"] for r in group]
        if "label" not in group[0] and "prompt" in group[0] and len(replies) >= 10 and len(set(replies)) == 1:
            found.append(f"{suite}, {task} on {corpus}, {condition}: every reply is the same.")
    return found + weak_judges(records)


def weak_judges(records: list[dict]) -> list[str]:
    """Judges that do not score the controls lower than true replies (paired by conversation, 95 %)."""
    from .judges import CONTROLS

    found = []
    judged = [record for record in records if record.get("judge")]
    for judge in sorted({record["judge"] for record in judged}):
        totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        lost = count = 0
        for record in judged:
            if record["judge"] == judge:
                count, lost = count + 1, lost + (record["value"] is None)
                if record["value"] is not None:
                    kind = record["condition"] if record["condition"] in CONTROLS else "true"
                    totals[f"{record['corpus']}/{record['id']}"][kind].append(record["value"])
        faults = [f"{100 * lost / count:.0f} % of its answers could not be read"] if lost > 0.2 * count else []
        for control in CONTROLS:
            pairs = [(np.mean(t[control]), np.mean(t["true"])) for t in totals.values() if t[control] and t["true"]]
            if not pairs:
                continue
            difference = np.array([[true - low, 1.0] for low, true in pairs])
            interval = metrics.bootstrap(difference, metrics.ratio)
            if interval is None or interval[0] <= 0:
                mean = difference[:, 0].mean()
                faults.append(f"it scores true replies {mean:+.2f} against a {control.removeprefix('control: ')}")
        if faults:
            found.append(f"the judge {judge} is too weak to use: {'; '.join(faults)}. Its figures are no evidence.")
    return found


def agreement(records: list[dict]) -> list[dict]:
    """Rank correlation of two judges over the same replies, for each metric."""
    from scipy.stats import spearmanr

    judges = sorted({record["judge"] for record in records if record.get("judge")})
    result = []
    for place, first in enumerate(judges):
        for second in judges[place + 1 :]:
            scores: dict[tuple, dict[str, float]] = defaultdict(dict)
            for r in records:
                if r.get("judge") in (first, second) and r["value"] is not None:
                    scores[r["metric"], r["corpus"], r["id"], r["condition"]][r["judge"]] = r["value"]
            for metric in sorted({key[0] for key in scores}):
                both = [(s[first], s[second]) for key, s in scores.items() if key[0] == metric and len(s) == 2]
                if len(both) > 2:
                    a, b = zip(*both, strict=True)
                    same = float(np.mean(np.abs(np.subtract(a, b)) <= 1))
                    rank = None if len(set(a)) == 1 or len(set(b)) == 1 else float(spearmanr(a, b).statistic)
                    entry = {"judges": [first, second], "metric": metric, "replies": len(both)}
                    result.append(entry | {"spearman": rank, "within one": same})
    return result


def compare(first: list[dict], second: list[dict]) -> list[dict]:
    """Paired differences (second - first) on the samples that both have, with intervals over the same speakers."""

    def key(r: dict) -> tuple:
        return (r["suite"], r["corpus"], r["task"], r["condition"], r.get("judge"), r.get("metric"), r["id"])

    known = {key(record): record for record in first}
    paired = [(known[key(record)], record) for record in second if key(record) in known]
    left, right = groups_of([a for a, _ in paired]), groups_of([b for _, b in paired])
    result = []
    for place, group in left.items():
        others = tallies_of(right[place])
        for metric, (tally, figure) in tallies_of(group).items():
            if metric == "majority class" or metric not in others:  # a file of replies has no losses
                continue
            other = others[metric][0]
            a, b = float(figure(tally.sum(0))), float(figure(other.sum(0)))
            low, high = metrics.paired_bootstrap(tally, other, figure) or (None, None)
            names = dict(zip(("suite", "corpus", "task", "condition", "judge"), place, strict=False))
            values = {"metric": metric, "first": a, "second": b, "difference": b - a, "low": low, "high": high}
            result.append(names | values | {"samples": len(group), "speakers": len(tally)})
    return result


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def show(value: float | None, metric: str) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" if metric in PERCENT or metric.endswith("unparsed") else f"{value:.2f}"


def cell(figure: dict) -> str:
    text = show(figure["value"], figure["metric"])
    if figure["low"] is not None and figure["metric"] != "majority class":
        text += f" ({show(figure['low'], figure['metric'])}–{show(figure['high'], figure['metric'])})"
    return text


def pivots(figures: list[dict], wanted=None) -> list[dict]:
    """Tables: one for each suite and metric, a row for each corpus and task, a column for each condition."""
    tables: dict[tuple, dict] = {}
    for figure in figures:
        if figure["metric"] == "majority class" or (wanted and figure["metric"] not in wanted):
            continue
        judge = f", judge {figure['judge']}" if figure["judge"] else ""
        title = f"{figure['suite']}: {figure['metric']}{' %' if show(1.0, figure['metric']) == '100.0' else ''}{judge}"
        table = tables.setdefault(title, {"suite": figure["suite"], "title": title, "columns": [], "rows": {}})
        if figure["condition"] not in table["columns"]:
            table["columns"].append(figure["condition"])
        place = (figure["corpus"], figure["task"])
        row = table["rows"].setdefault(place, {"samples": 0, "speakers": 0, "cells": {}})
        row["samples"], row["speakers"] = (
            max(row["samples"], figure["samples"]),
            max(row["speakers"], figure["speakers"]),
        )
        row["cells"][figure["condition"]] = cell(figure)
        if figure["metric"] == "accuracy":
            most = next(f for f in figures if f["metric"] == "majority class" and same_place(f, figure))
            row["cells"]["most frequent label"] = cell(most)
    for table in tables.values():
        table["rows"] = dict(sorted(table["rows"].items(), key=lambda item: _order(*item[0])))
        if any("most frequent label" in row["cells"] for row in table["rows"].values()):
            table["columns"].append("most frequent label")
    return list(tables.values())


def _order(corpus: str, task: str) -> tuple:
    base = task.split(",")[0]
    return corpus, TASKS.index(base) if base in TASKS else len(TASKS), task


def same_place(a: dict, b: dict) -> bool:
    return all(a[name] == b[name] for name in ("suite", "corpus", "task", "condition", "judge"))


def markdown(figures: list[dict], wanted=HEADLINE) -> str:
    """The headline figures as Markdown tables."""
    lines = []
    for table in pivots(figures, wanted):
        lines += ["", f"**{table['title']}** (95 % interval over speakers)", ""]
        lines.append("| corpus, task | samples / speakers | " + " | ".join(table["columns"]) + " |")
        lines.append("|---" * (2 + len(table["columns"])) + "|")
        for (corpus, task), row in table["rows"].items():
            cells = [row["cells"].get(column, "") for column in table["columns"]]
            lines.append(f"| {corpus}, {task} | {row['samples']} / {row['speakers']} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def write_card(folder: Path, report: dict) -> None:
    """The figures of P&L and `heard` as `model-index` metadata of the folder's README.md, and its section "Evaluation"."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = folder / "README.md"
    card = ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else ModelCard("---\n---\n")
    results = []
    for figure in report["figures"]:
        # What is heard is taken from all clips where they were asked, else from those that replies were asked for.
        direct = figure["suite"] == "hearing" or "hearing" not in report["suites"]
        wanted = figure["suite"] in ("hearing", "asr", "attributes", "meld")
        wanted = wanted and (figure["condition"] == "P&L" or (figure["condition"] == "heard" and direct))
        if wanted and figure["metric"] in ("WER", "accuracy", "unweighted accuracy", "weighted F1"):
            results.append(
                EvalResult(
                    task_type="automatic-speech-recognition" if figure["task"] == "asr" else "audio-classification",
                    task_name=figure["task"],
                    dataset_type=figure["corpus"],
                    dataset_name=f"{figure['corpus']} ({report['setup']['split']} speakers), {figure['task']}",
                    dataset_config=figure["task"],  # else the results of one data set are merged
                    dataset_split=report["setup"]["split"],
                    metric_type="wer" if figure["metric"] == "WER" else figure["metric"].replace(" ", "_"),
                    metric_name=f"{figure['metric']} %, {figure['condition']}",
                    metric_value=round(100 * figure["value"], 1),
                )
            )
    known = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    card.data = ModelCardData(**known, model_name=folder.resolve().name, eval_results=results)
    start, end = "<!-- evaluation: written by dual-slm evaluate -->", "<!-- end of evaluation -->"
    section = [start, markdown(report["figures"]), ""]
    shown = report["warnings"][:CARD_WARNINGS]
    section += [f"- {warning}" for warning in shown]
    if len(report["warnings"]) > len(shown):
        section.append(f"- and {len(report['warnings']) - len(shown)} more warnings in the report.")
    section.append(end)
    text = card.text
    if start in text and end in text:
        text = text[: text.index(start)] + "\n".join(section) + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip() + "\n\n## Evaluation\n\n" + "\n".join(section) + "\n"
    card.text = text
    card.save(path)


# --------------------------------------------------------------------------------------------------------------------
# HTML
# --------------------------------------------------------------------------------------------------------------------

_STYLE = (ASSETS / "report.css").read_text(encoding="utf-8")


def _table(table: dict) -> str:
    head = "".join(
        f"<th>{html.escape(name)}</th>" for name in ("corpus, task", "samples / speakers", *table["columns"])
    )
    body = ""
    for (corpus, task), row in table["rows"].items():
        cells = "".join(f"<td>{html.escape(row['cells'].get(column, ''))}</td>" for column in table["columns"])
        counts = f"<td>{row['samples']} / {row['speakers']}</td>"
        body += f"<tr><td>{html.escape(corpus)}, {html.escape(task)}</td>{counts}{cells}</tr>"
    return f"<h3>{html.escape(table['title'])}</h3><div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _matrix(entry: dict) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in (*entry["labels"], "unparsed"))
    body = ""
    for label, row in zip(entry["labels"], entry["matrix"], strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="background: rgba(9,105,218,{0.75 * n / total:.2f})">{n or ""}</td>' for n in row)
        body += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    title = f"{entry['suite']}, {entry['task']} on {entry['corpus']}, {entry['condition']} (rows: true)"
    table = f"<table class=matrix><tr><th></th>{head}</tr>{body}</table>"
    return f"<div><h3>{html.escape(title)}</h3><div class=scroll>{table}</div></div>"


def _audio(path: str | None, seconds: float = 8.0) -> str:
    """A clip inside the page, as Ogg."""
    import soundfile

    from ...processing_dual_slm import load_audio

    if not path or not Path(path).is_file():
        return ""
    buffer = io.BytesIO()
    soundfile.write(buffer, load_audio(path)[: int(16_000 * seconds)], 16_000, format="OGG", subtype="VORBIS")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/ogg;base64,{data}"></audio>'


def _example(record: dict) -> str:
    wanted = record.get("said") or record.get("label") or record.get("wanted") or ""
    heard = f" → {record['parsed']}" if "parsed" in record else ""
    lines = [
        f"<p class=dim>{html.escape(' · '.join((record['suite'], record['task'], record['condition'], record['id'])))}</p>"
    ]
    lines.append(_audio(record["audio"]))
    if wanted:
        lines.append(f"<p><b>wanted</b> {html.escape(str(wanted))}</p>")
    lines.append(f"<p><b>reply</b> {html.escape(record['reply'])}{html.escape(heard)}</p>")
    if record.get("prompt"):
        lines.append(
            f"<details><summary class=dim>prompt</summary><pre>{html.escape(record['prompt'])}</pre></details>"
        )
    return f"<div class=example>{''.join(lines)}</div>"


def draw(figures: list[dict]) -> bytes | None:
    """The disentanglement suite as a picture: accuracy of each task by condition, and what follows whom in the swap test."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = ["P&L", "P only", "L only", "none", "swap"]
    ours = [f for f in figures if f["suite"] == "disentanglement" and f["condition"] in wanted]
    ours = [f for f in ours if f["metric"] in ("accuracy", "WER") and "," not in f["task"]]
    if not ours:
        return None
    tasks = sorted({(f["task"] != "asr", f["corpus"], f["task"]) for f in ours})
    figure, axis = plt.subplots(figsize=(max(7, 1.3 * len(tasks)), 4.2), layout="constrained")
    for number, condition in enumerate(wanted):
        for place, (_, corpus, task) in enumerate(tasks):
            for f in ours:
                if (f["corpus"], f["task"], f["condition"]) == (corpus, task, condition):
                    value = max(0.0, 1 - f["value"]) if f["metric"] == "WER" else f["value"]
                    axis.bar(place + 0.16 * (number - 2), 100 * value, 0.15, color=f"C{number}")
    axis.set_xticks(range(len(tasks)), [f"{task}\n{corpus}" for _, corpus, task in tasks], fontsize=8)
    axis.set(ylabel="% right (asr: 100 - WER)", ylim=(0, 105), title="Which branch carries what")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{n}") for n in range(len(wanted))]
    axis.legend(handles, wanted, ncols=len(wanted), fontsize=8, loc="upper center")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def page(report: dict, records: list[dict], picture: bytes | None, examples: int = 4) -> str:
    """One self-contained page; `picture` as `draw` gives it."""
    setup = report["setup"]
    name = "/".join(Path(setup["system"]).parts[-2:])
    parts = [f"<h1>{html.escape(name)}</h1>"]
    about = f"{setup['split']} split, seed {setup['seed']}, {setup['date']}, {report['seconds']:.0f} s; data: "
    parts.append(
        f"<p class=dim>{html.escape(about + ', '.join(setup['data']))}. Intervals: 95 %, bootstrap over speakers.</p>"
    )
    parts += [f"<div class=warning>{html.escape(warning)}</div>" for warning in report["warnings"]]
    parts += [f"<p class=dim>{html.escape(note)}</p>" for note in report["notes"]]
    for suite in report["suites"]:
        parts.append(f"<h2>{html.escape(suite)}</h2>")
        if suite == "disentanglement" and picture:
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="accuracy by condition" src="data:image/png;base64,{data}">')
        figures = [f for f in report["figures"] if f["suite"] == suite]
        tables = pivots(figures)
        parts += [_table(t) for t in tables if any(t["title"].startswith(f"{suite}: {m}") for m in HEADLINE)]
        rest = [_table(t) for t in tables if not any(t["title"].startswith(f"{suite}: {m}") for m in HEADLINE)]
        if rest:
            opened = " open" if suite == "conversation" else ""
            parts.append(f"<details{opened}><summary>other figures</summary>{''.join(rest)}</details>")
        matrices = [_matrix(m) for m in report["confusions"] if m["suite"] == suite]
        if matrices:
            parts.append(f"<div class=matrices>{''.join(matrices)}</div>")
        own = [r for r in records if r["suite"] == suite and r.get("prompt")]
        chosen = random.Random(0).sample(own, min(examples, len(own)))
        parts += [_example(record) for record in chosen]
    if report["agreement"]:
        lines = "".join(
            f"<tr><td>{html.escape(a['metric'])}</td><td>{a['replies']}</td><td>{show(a['spearman'], '')}</td>"
            f"<td>{show(a['within one'], 'share')} %</td></tr>"
            for a in report["agreement"]
        )
        names = html.escape(" and ".join(report["agreement"][0]["judges"]))
        head = "<tr><th>metric</th><th>replies</th><th>Spearman</th><th>within one point</th></tr>"
        parts.append(f"<h3>Agreement of {names}</h3><div class=scroll><table>{head}{lines}</table></div>")
    title = html.escape(f"{name}: evaluation")
    head = (
        f'<meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>{title}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def write_report(folder: Path, report: dict, records: list[dict]) -> None:
    """report.json, report.html and, of the disentanglement suite, a picture."""
    write_json(folder / "report.json", report)
    picture = draw(report["figures"])
    write_text(folder / "report.html", page(report, records, picture))
    if picture:
        (folder / "disentanglement.png").write_bytes(picture)


def read_records(folder: Path) -> list[dict]:
    """All records of an evaluation."""
    from .suites import SUITES, output

    paths = [path for suite in SUITES if (path := output(Path(folder), suite)).is_file()]
    if not paths or not (Path(folder) / "report.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished evaluation (report.json and one .jsonl a suite).")
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").split("\n"))
    return [json.loads(line) for line in lines if line]
