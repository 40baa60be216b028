"""Figures of records: metrics with intervals, confusion matrices, warnings, agreement of judges, tables, differences."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations, product
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..labels import TASKS
from . import metrics
from .judges import CONTROLS
from .records import Record

# A figure: suite, corpus, task, condition, judge, metric, value, low, high (95 % interval), samples, speakers.
FigureRecord = dict[str, Any]
Tally = tuple[np.ndarray, metrics.Figure]  # (S, ...), one for each speaker, and the function of their sum

PERCENT = {"WER", "accuracy", "unweighted accuracy", "macro F1", "weighted F1", "unparsed", "majority class", "share"}
PERCENT |= {"names the other clip's label", "WER against the other clip", "calibration error"}
HEADLINE = ("WER", "accuracy", "share")
SUMMARY = (*HEADLINE, "unweighted accuracy", "answer loss")  # metrics of comparisons and of means over seeds
HEARING = ("P&L", "P only", "heard")  # conditions that must be better than the most frequent label
PLACE = ("suite", "corpus", "task", "condition", "judge")
FEWEST = 10  # samples of a warning
ROLES = ("styletalk", "styletalk_reversed")  # corpora of the same dialogues; in the second the roles are exchanged
BOTH_ROLES = "styletalk, both roles"


def groups_of(records: list[Record]) -> dict[tuple, list[Record]]:
    """Records by place and metric of a judge.

    Tasks of their own are pitch within each gender, and the words of each subset. Judged replies to StyleTalk's turns
    count by role and, if there are both, together.
    """
    groups = defaultdict(list)
    judged = {r["corpus"] for r in records if r.get("judge")}
    for r in records:
        tasks, corpora = [r["task"]], [r["corpus"]]
        if r["task"] == "pitch" and r.get("gender") and "label" in r:
            tasks.append(f"pitch, {r['gender']} voices")
        if r["suite"] in ("asr", "hearing") and "words" in r and r.get("subset"):
            tasks.append(f"asr, {r['subset']}")
        if r.get("judge") and r["corpus"] in ROLES and judged.issuperset(ROLES):
            corpora.append(BOTH_ROLES)
        for corpus, task in product(corpora, tasks):
            groups[r["suite"], corpus, task, r["condition"], r.get("judge"), r.get("metric")].append(r)
    return groups


def tallies_of(records: list[Record]) -> dict[str, Tally]:
    """Metric -> its tallies, in order of the speakers' names."""
    by_speaker = defaultdict(list)
    for record in records:
        by_speaker[record["speaker"]].append(record)
    speakers = [by_speaker[name] for name in sorted(by_speaker)]

    def mean(total: Callable[[Record], float], count: Callable[[Record], int]) -> Tally:
        return np.array([[sum(map(total, group)), sum(map(count, group))] for group in speakers]), metrics.ratio

    first, found = records[0], {}
    if "answer_nll" in first:  # loss of a token of the right answer
        found["answer loss"] = mean(itemgetter("answer_nll"), itemgetter("answer_tokens"))
    if "words" in first:
        found["WER"] = mean(itemgetter("errors"), itemgetter("words"))
        if "other" in first:
            found["WER against the other clip"] = mean(lambda r: r["other"]["errors"], lambda r: r["other"]["words"])
    elif "label" in first:
        _, tally = _confusions(speakers)
        found |= {name: (tally, figure) for name, figure in metrics.LABEL_FIGURES.items()}
        found["majority class"] = tally, metrics.majority
        if first["corpus"] == "meld":
            found["weighted F1"] = tally, metrics.weighted_f1
        if "confidence" in first:
            pairs = ([(r["confidence"], r["label"] == r["parsed"]) for r in group] for group in speakers)
            found["calibration error"] = np.stack([*map(metrics.calibration, pairs)]), metrics.calibration_error
        if any(r.get("other", {}).get("label") for r in records):
            known = mean(lambda r: r["parsed"] == r["other"]["label"] is not None, lambda r: bool(r["other"]["label"]))
            found["names the other clip's label"] = known
    elif "value" in first:
        found[first.get("metric") or "share"] = mean(lambda r: r["value"] or 0.0, lambda r: r["value"] is not None)
        if "judge" in first:
            found[f"{first['metric']}, unparsed"] = mean(lambda r: r["value"] is None, lambda r: 1)
    return found


def _confusions(groups: list[list[Record]]) -> tuple[list[str], np.ndarray]:
    """All labels, and a confusion matrix for each group."""
    labels = sorted({label for group in groups for record in group for label in record["choices"]})
    pairs = ([(r["label"], r["parsed"]) for r in group] for group in groups)
    return labels, np.stack([metrics.confusion(group, labels) for group in pairs])


def figures_of(records: list[Record]) -> list[FigureRecord]:
    """Every metric of every group with its 95 % interval over speakers (None for one speaker)."""
    result = []
    for place, group in groups_of(records).items():
        for metric, (tally, figure) in tallies_of(group).items():
            value = float(figure(tally.sum(0)))
            if np.isfinite(value):  # a judge without any readable answer has no figure
                low, high = metrics.bootstrap(tally, figure) or (None, None)
                entry = dict(zip(PLACE, place, strict=False)) | {"metric": metric, "value": value}
                entry |= {"low": low, "high": high, "samples": len(group), "speakers": len(tally)}
                result.append(entry)
    return result


def confusions_of(records: list[Record]) -> list[dict[str, Any]]:
    """Confusion matrices of the conditions P&L and heard."""
    result = []
    for (suite, corpus, task, condition, *_), group in groups_of(records).items():
        wanted = suite in ("hearing", "attributes", "meld") and condition in ("P&L", "heard") and "," not in task
        if wanted and "label" in group[0]:
            place = {"suite": suite, "corpus": corpus, "task": task, "condition": condition}
            labels, (matrix,) = _confusions([group])
            result.append(place | {"labels": labels, "matrix": matrix.tolist()})
    return result


def agreement(records: list[Record]) -> list[dict[str, Any]]:
    """Rank correlation of each two judges over the same replies, for each metric."""
    from scipy import stats

    judged = [record for record in records if record.get("judge") and record["value"] is not None]
    if not judged:
        return []
    reply = ["metric", "corpus", "id", "condition"]
    scores: Any = pd.DataFrame(judged).pivot_table("value", reply, "judge", aggfunc="last", sort=False)
    result = []
    for judges in map(list, combinations(sorted(scores.columns), 2)):
        for metric, part in scores[judges].dropna().groupby(level="metric"):
            if len(part) > 2:
                varied, near = part.nunique().min() > 1, (part.diff(axis=1).abs().iloc[:, 1] <= 1).mean()
                correlation: Any = stats.spearmanr(part) if varied else None
                entry = {"judges": judges, "metric": metric, "replies": len(part)}
                entry["spearman"] = float(correlation.statistic) if varied else None
                result.append(entry | {"within one": float(near)})
    return result


def compare(first: list[Record], second: list[Record]) -> list[dict[str, Any]]:
    """Differences (second - first) over the samples of both, with paired intervals over speakers."""

    def key(record: Record) -> tuple:
        return tuple(record.get(name) for name in (*PLACE, "metric", "id"))

    known = {key(record): record for record in first}
    paired = [record for record in second if key(record) in known]
    right = groups_of(paired)
    result = []
    for place, group in groups_of([known[key(record)] for record in paired]).items():
        others = tallies_of(right[place]) if place in right else {}  # a subset that one table does not name
        for metric, (tally, figure) in tallies_of(group).items():
            if metric == "majority class" or metric not in others:  # a file of replies has no answer loss
                continue
            other = others[metric][0]
            a, b = float(figure(tally.sum(0))), float(figure(other.sum(0)))
            low, high = metrics.bootstrap(other, figure, baseline=tally) or (None, None)
            entry = dict(zip(PLACE, place, strict=False)) | {"metric": metric, "first": a, "second": b}
            entry |= {"difference": b - a, "low": low, "high": high}
            result.append(entry | {"samples": len(group), "speakers": len(tally)})
    return result


def warnings_of(records: list[Record], figures: list[FigureRecord]) -> list[str]:
    """Faults that make a figure worthless: chance level, unparsed replies, exchanged branches, weak judges."""
    places: dict[tuple, dict[str, FigureRecord]] = defaultdict(dict)
    for figure in figures:
        places[tuple(figure[name] for name in PLACE)][figure["metric"]] = figure
    found = []
    for (suite, corpus, task, condition, judge), here in places.items():
        if task.startswith("asr, "):  # all subsets together are judged
            continue
        words_alone = places.get((suite, corpus, task, "L only", judge), {})
        doubts = _doubts(task, condition, here, words_alone)
        found += [f"{suite}, {task} on {corpus}, {condition}: {doubt}" for doubt in doubts]
    for (suite, corpus, task, condition, *_), group in groups_of(records).items():
        if not task.startswith("asr, ") and (text := _monotony(task, condition, group)):
            found.append(f"{suite}, {task} on {corpus}, {condition}: {text}")
    return found + weak_judges(records)


def _percent(number: float) -> str:
    return f"{100 * number:.1f} %"


def _doubts(
    task: str, condition: str, here: dict[str, FigureRecord], words_alone: dict[str, FigureRecord]
) -> Iterator[str]:
    """Doubts about the figures of one place; `words_alone` are those of the condition L only."""
    accuracy, errors, enough = here.get("accuracy"), here.get("WER"), next(iter(here.values()))["samples"] >= FEWEST
    if accuracy and condition.split(",")[0] in HEARING and enough:
        value, most, lost = (here[name]["value"] for name in ("accuracy", "majority class", "unparsed"))
        if (value if accuracy["low"] is None else accuracy["low"]) <= most and "," not in task:
            yield f"{_percent(value)} is not above always naming the most frequent label ({_percent(most)})."
        if lost > 0.2:
            yield f"{_percent(lost)} of the replies name no label, or several."
    if errors and condition in ("P&L", "L only", "heard") and errors["value"] >= 0.9:
        yield f"a word error rate of {_percent(errors['value'])}; the words are not heard."
    if errors and condition == "P only" and "WER" in words_alone and enough:
        high = 1.0 if errors["high"] is None else errors["high"]
        if high < words_alone["WER"]["value"]:
            yield "the words come through the paralinguistic branch (L only is worse)."
    # The swap test: replies that follow the wrong clip.
    other = here.get("names the other clip's label")
    if accuracy and other and enough and (other["low"] or 0.0) > accuracy["value"]:
        yield (
            f"the reply names the label of the clip whose words are heard ({_percent(other['value'])}) more "
            f"often than that of the voice ({_percent(accuracy['value'])}): the branches look exchanged."
        )
    other = here.get("WER against the other clip")
    if errors and other and enough and other["value"] < errors["value"]:
        yield "the transcript follows the clip of the voice, not of the words."


def _monotony(task: str, condition: str, group: list[Record]) -> str | None:
    """The same reply to different clips, under conditions where something is heard."""
    heard = condition.split(",")[0] in HEARING and (condition, task) != ("P only", "asr")
    if not heard and (condition, task) != ("L only", "asr"):
        return None
    if "label" in group[0]:
        named = [r["parsed"] for r in group if r["parsed"] is not None]
        if len(named) >= FEWEST and len(set(named)) == 1 and len({r["label"] for r in group}) > 1:
            return f"every reply is {named[0]!r}."
    elif "prompt" in group[0] and len(group) >= FEWEST and len({r["reply"] for r in group}) == 1:
        return "every reply is the same."
    return None


def weak_judges(records: list[Record]) -> list[str]:
    """Judges that do not score the controls lower than true replies (paired by conversation, 95 % interval)."""
    judged = [record for record in records if record.get("judge")]
    if not judged:
        return []
    found = []
    for judge, own in pd.DataFrame(judged).astype({"value": float}).groupby("judge"):
        lost = own["value"].isna().mean()
        faults = [f"{100 * lost:.0f} % of its answers could not be read"] if lost > 0.2 else []
        own["kind"] = own["condition"].where(own["condition"].isin(CONTROLS), "true")
        means: Any = own.pivot_table("value", ["corpus", "id"], "kind", aggfunc="mean", sort=False)
        means = means.reindex(columns=["true", *CONTROLS])
        for control in CONTROLS:
            gap = (means["true"] - means[control]).dropna()
            interval = metrics.bootstrap(np.stack([gap, np.ones(len(gap))], axis=1), metrics.ratio)
            if len(gap) and (interval is None or interval[0] <= 0):
                faults.append(
                    f"it scores true replies {gap.mean():+.2f} against a {control.removeprefix('control: ')}"
                )
        if faults:
            found.append(f"the judge {judge} is too weak to use: {'; '.join(faults)}. Its figures are no evidence.")
    return found


class Pivot(NamedTuple):
    """A table of the report: a row of texts for each corpus and task, a column for each condition."""

    title: str
    head: list[str]
    rows: list[list[str]]


def show(value: float | None, metric: str) -> str:
    """A value as text, in % where the metric is a share."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" if metric in PERCENT or metric.endswith("unparsed") else f"{value:.2f}"


def cell(figure: FigureRecord) -> str:
    """A figure and its interval as text."""
    value, low, high = (show(figure[name], figure["metric"]) for name in ("value", "low", "high"))
    return value if figure["low"] is None or figure["metric"] == "majority class" else f"{value} ({low}–{high})"


def pivots(figures: list[FigureRecord], wanted: tuple[str, ...] = ()) -> list[Pivot]:
    """One table for each suite and metric.

    Args:
        wanted: metrics. Default: all.
    """
    if not figures:
        return []
    place, result = ["corpus", "task"], []
    frame: Any = pd.DataFrame([f | {"title": _title(f), "cell": cell(f)} for f in figures])
    majority = frame[frame["metric"] == "majority class"].groupby(["suite", *place])["cell"].last()
    for title, part in frame.groupby("title", sort=False):
        suite, metric = part[["suite", "metric"]].iloc[0]
        if metric == "majority class" or (wanted and metric not in wanted):
            continue
        table: Any = part.pivot(index=place, columns="condition", values="cell")[[*part["condition"].unique()]]
        most = part.groupby(place)[["samples", "speakers"]].max().astype(str)
        table.insert(0, "samples / speakers", most["samples"] + " / " + most["speakers"])
        if metric == "accuracy":
            table["most frequent label"] = majority[suite]
        cells = table.loc[sorted(table.index, key=_order)].fillna("").itertuples(name=None)
        rows = [[", ".join(row), *texts] for row, *texts in cells]
        result.append(Pivot(title, ["corpus, task", *table.columns], rows))
    return result


def _title(figure: FigureRecord) -> str:
    metric = figure["metric"]
    judge = f", judge {figure['judge']}" if figure["judge"] else ""
    return f"{figure['suite']}: {metric}{' %' if show(1.0, metric) == '100.0' else ''}{judge}"


def _order(row: tuple[str, str]) -> tuple[str, int, str]:
    corpus, task = row
    base = task.split(",")[0]
    return corpus, TASKS.index(base) if base in TASKS else len(TASKS), task
