"""What is in a table: counts, hours, labels, speakers, leaks between splits, positions of speech; as text and figure."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..templates_dual_slm import fit_messages
from ..turns_dual_slm import AUDIO_MARK
from .corpora import CORPORA
from .corpora.row import Row
from .labels import ATTRIBUTES, SPLITS
from .tasks import Message, label_sets, make_sample, tasks_of

_COLOURS = {"train": "#4477aa", "validation": "#ccbb44", "test": "#ee6677"}
_LINE = "{corpus:<20}{split:<12}{rows:>8,}{audio:>8,}{hours:>9.2f}{speakers:>10,}{dialogues:>11,}{responses:>11,}"


def count(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record for each corpus and split: rows, rows with audio, hours, speakers, dialogues and responses."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.corpus, row.split].append(row)
    records = []
    for (corpus, split), members in sorted(groups.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))):
        known = {"corpus": corpus, "split": split, "rows": len(members)}
        known |= {"audio": sum(row.audio is not None for row in members)}
        known |= {"hours": sum(row.duration or 0 for row in members) / 3600}
        known |= {
            f"{name}s": len({getattr(row, name) for row in members} - {None}) for name in ("speaker", "dialogue")
        }
        records.append(known | {"responses": sum(row.response is not None for row in members)})
    return records


def leaks(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """What is in several splits: leaks, and what a corpus shares by design.

    Speakers and audio files are compared by name, also between corpora; dialogues within their corpus. Sentences of four
    words or more are told as shared, but are not leaks: some corpora have only a few sentences.
    """
    splits = {kind: defaultdict(set) for kind in ("speaker", "audio", "dialogue", "sentence")}
    by_design = {name for name, corpus in CORPORA.items() if corpus.shares_speakers}
    leaky = {row.speaker for row in rows if row.corpus not in by_design}
    for row in rows:
        keys = {"speaker": row.speaker, "audio": row.audio}
        keys["dialogue"] = row.dialogue and f"{row.corpus}, {row.dialogue}"
        if row.transcript and len(row.transcript.split()) >= 4:
            keys["sentence"] = row.transcript.lower()
        for kind, key in keys.items():
            if key is not None:
                splits[kind][key].add(row.split)
    found, known = [], []
    for kind, where in splits.items():
        shared = {key for key, places in where.items() if len(places) > 1}
        expected = shared if kind == "sentence" else shared - leaky if kind == "speaker" else set()
        reason = " (by the corpus's design)" if kind == "speaker" else " (the same words, not a leak)"
        for keys, report, why in ((shared - expected, found, ""), (expected, known, reason)):
            if keys:
                example = min(keys)
                places = " and ".join(sorted(where[example], key=SPLITS.index))
                report.append(f"{len(keys):,} x {kind} in several splits{why}, such as {example[:70]!r} in {places}")
    return found, known


def first_speech_positions(rows: Sequence[Row], tokenizer: Any, seed: int = 0, limit: int = 2_000) -> list[int]:
    """Number of tokens before the first speech embedding, in one task of at most `limit` rows (paper, section III-C)."""
    choices, positions = label_sets(rows), []
    for index in np.random.default_rng(seed).permutation(len(rows)):
        row = rows[index]
        if not (tasks := tasks_of(row)):
            continue
        # Positions are varied for dialogues, so a row that can be a dialogue is one.
        task = "dialogue" if "dialogue" in tasks else tasks[index % len(tasks)]
        positions.append(speech_position(make_sample(row, task, choices, seed).messages, tokenizer))
        if len(positions) == limit:
            break
    return positions


def speech_position(messages: Sequence[Message], tokenizer: Any = None) -> int:
    """Number of tokens before the first speech embedding of a conversation whose last turn is spoken.

    Without a tokenizer it is an estimate: a token for four letters, and five for the marks around each turn.
    """
    if tokenizer is None:
        return sum(len(message["content"]) // 4 + 5 for message in messages[:-1]) + 3
    spoken = {**messages[-1], "content": AUDIO_MARK}
    text = tokenizer.apply_chat_template(fit_messages([*messages[:-1], spoken], tokenizer), tokenize=False)
    return len(tokenizer(text.split(AUDIO_MARK)[0], add_special_tokens=False)["input_ids"])


def describe_positions(positions: Sequence[int]) -> str:
    """Quantiles of `speech_position`, as text."""
    quantiles = np.quantile(positions, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).round().astype(int)
    names = ("least", "5 %", "25 %", "median", "75 %", "95 %", "most")
    named = (f"{position} ({name})" for position, name in zip(quantiles, names, strict=True))
    return f"first speech embedding at token {', '.join(named)}"


def describe_table(rows: Sequence[Row], positions: Sequence[int] | None = None) -> str:
    """Statistics of a table, and of its `first_speech_positions`, as text."""
    records = count(rows)
    lines = ["corpus              split           rows   audio    hours  speakers  dialogues  responses"]
    lines += [_LINE.format(**record) for record in records]
    rows_of_all, audio, hours = (sum(r[name] for r in records) for name in ("rows", "audio", "hours"))
    lines += [f"{'all':<32}{rows_of_all:>8,}{audio:>8,}{hours:>9.2f}", ""]
    for name in ATTRIBUTES:
        labels = Counter(row.label(name) for row in rows)
        unknown = labels.pop(None, 0)
        shares = ", ".join(f"{label} {n:,} ({n / sum(labels.values()):.0%})" for label, n in labels.most_common())
        lines.append(f"{name:<10}{shares or '-'}" + (f"; unknown {unknown:,}" if unknown else ""))
    if positions:
        lines += ["", describe_positions(positions)]
    found, known = leaks(rows)
    lines.append("")
    lines += [f"LEAK  {leak}" for leak in found] or ["no leaks: no speaker, dialogue or audio file is in two splits"]
    return "\n".join([*lines, *(f"note  {note}" for note in known)])


def plot_table(rows: Sequence[Row], path: str | Path, positions: Sequence[int], title: str) -> None:
    """Statistics of a table as an image. Without `first_speech_positions`, the lengths of the histories are shown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    sizes, labels, emotions, durations, pitch, turns = figure.subplots(2, 3).flat
    _plot_sizes(sizes, rows)
    _plot_labels(labels, rows)
    counts = Counter(row.emotion for row in rows)
    emotions.set(title=f"emotions ({counts.pop(None, 0):,} rows unknown)", xlabel="rows")
    ordered = dict(counts.most_common()[::-1])
    emotions.barh(list(ordered), list(ordered.values()), color="#66ccee")
    if seconds := [row.duration for row in rows if row.duration]:
        durations.hist(np.clip(seconds, 0, 20), bins=40, color="#4477aa")
        durations.set(title=f"length of clips (median {np.median(seconds):.1f} s)", xlabel="seconds (20: or longer)")
    else:
        durations.set(title="no audio")
    _plot_pitch(pitch, rows)
    if positions:
        turns.hist(positions, bins=40, color="#ee6677")
        turns.set(title="where the first speech embedding is", xlabel="tokens before it")
    else:
        earlier = Counter(len(row.history) for row in rows)
        turns.bar(list(earlier), list(earlier.values()), color="#ee6677")
        turns.set(title="turns before the spoken one", xlabel="turns")
    figure.savefig(path, dpi=110)


def _plot_sizes(axis: Any, rows: Sequence[Row]) -> None:
    records, sizes = count(rows), Counter(row.corpus for row in rows)
    names = sorted(sizes, reverse=True)
    unit, left = "hours" if any(r["hours"] for r in records) else "rows", np.zeros(len(names))
    for split, colour in _COLOURS.items():
        value = {r["corpus"]: r[unit] for r in records if r["split"] == split}
        widths = np.array([value.get(name, 0.0) for name in names])
        axis.barh(names, widths, left=left, color=colour, label=split)
        left = left + widths
    axis.set_yticks(range(len(names)), [f"{name}\n{sizes[name]:,} rows" for name in names])
    axis.legend()
    axis.set(title=unit, xlabel=unit)


def _plot_labels(axis: Any, rows: Sequence[Row]) -> None:
    from matplotlib import colormaps

    names = ATTRIBUTES[3::-1]  # without the emotion, from bottom to top
    for place, name in enumerate(names):
        labels, start = Counter(row.label(name) for row in rows if row.label(name) is not None), 0.0
        order = [label for label in ("female", "male", "slow", "low", "normal", "fast", "high") if label in labels]
        for shade, label in enumerate(order):
            width = labels[label] / sum(labels.values())
            axis.barh(place, width, left=start, color=colormaps["viridis"](0.25 + 0.3 * shade))
            style = {"ha": "center", "va": "center", "fontsize": 9, "color": "black" if shade else "white"}
            axis.text(start + width / 2, place, f"{label}\n{width:.0%}", **style)
            start += width
    axis.set(title="labels", yticks=range(len(names)), yticklabels=names, xlim=(0, 1))


def _plot_pitch(axis: Any, rows: Sequence[Row]) -> None:
    for gender, colour in (("female", "#aa3377"), ("male", "#228833"), (None, "#bbbbbb")):
        values = [row.pitch_hz for row in rows if row.pitch_hz and row.gender == gender]
        if values:
            axis.hist(values, bins=40, range=(60, 400), color=colour, alpha=0.6, label=gender or "gender unknown")
    if axis.has_data():
        axis.legend()
        axis.set(title="mean pitch", xlabel="Hz")
    else:
        axis.set(title="pitch not measured (corpus label)")
