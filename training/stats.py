"""What is in a table: counts, hours, labels, speakers of each split, leaks between splits, where speech begins."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from .attributes import MEASURED
from .corpora import CORPORA
from .corpora.schema import SPLITS
from .tasks import ATTRIBUTES, label_sets, make_sample, tasks_of


def count(rows: list[dict]) -> list[dict]:
    """One record for each (corpus, split): rows, with audio, hours, speakers, dialogues, responses."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["corpus"], row["split"]].append(row)
    records = []
    for (corpus, split), members in sorted(groups.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))):
        records.append(
            {
                "corpus": corpus,
                "split": split,
                "rows": len(members),
                "audio": sum(row["audio"] is not None for row in members),
                "hours": sum(row["duration"] or 0 for row in members) / 3600,
                "speakers": len({row["speaker"] for row in members} - {None}),
                "dialogues": len({row["dialogue"] for row in members} - {None}),
                "responses": sum(row["response"] is not None for row in members),
            }
        )
    return records


def leaks(rows: list[dict]) -> tuple[list[str], list[str]]:
    """What two splits share: (leaks, what is shared by a corpus's own design or cannot be helped).

    Speakers and audio files are compared within and across corpora by name, dialogues within their corpus. Sentences
    that are read in several splits are told apart from leaks: some corpora have but a few.
    """
    places: dict[str, dict] = {kind: defaultdict(set) for kind in ("speaker", "audio", "dialogue", "sentence")}
    corpora = defaultdict(set)
    for row in rows:
        keys = {"speaker": row["speaker"], "audio": row["audio"], "sentence": None}
        keys["dialogue"] = row["dialogue"] and f"{row['corpus']}, {row['dialogue']}"
        if row["transcript"] and len(row["transcript"].split()) >= 4:
            keys["sentence"] = row["transcript"].lower()
        for kind, key in keys.items():
            if key is not None:
                places[kind][key].add(row["split"])
                if kind == "speaker":
                    corpora[key].add(row["corpus"])
    found, known = [], []
    for kind, where in places.items():
        shared = {key: splits for key, splits in where.items() if len(splits) > 1}
        by_design = {k for k in shared if kind == "speaker" and all(_shares_speakers(c) for c in corpora[k])}
        if kind == "sentence":
            by_design = set(shared)
        for keys, report, why in (
            (set(shared) - by_design, found, ""),
            (by_design, known, " (by the corpus's design)" if kind == "speaker" else " (the same words, not a leak)"),
        ):
            if keys:
                example = min(keys)
                splits = " and ".join(sorted(shared[example], key=SPLITS.index))
                report.append(f"{len(keys):,} x {kind} in several splits{why}, such as {example[:70]!r} in {splits}")
    return found, known


def _shares_speakers(corpus: str) -> bool:
    return corpus in CORPORA and CORPORA[corpus].shares_speakers


def first_speech_positions(rows: list[dict], tokenizer, seed: int = 0, limit: int = 2_000) -> list[int]:
    """Tokens before the first speech embedding, for one task of each of at most `limit` rows (section III-C)."""
    choices, positions = label_sets(rows), []
    order = np.random.default_rng(seed).permutation(len(rows))
    for index in order:
        row = rows[index]
        tasks = tasks_of(row)
        if not tasks:
            continue
        # A row that can be a dialogue is one: these are what positions are varied for.
        task = "dialogue" if "dialogue" in tasks else tasks[index % len(tasks)]
        messages = make_sample(row, task, choices, seed).messages
        spoken = {**messages[-1], "content": "<|audio|>"}
        text = tokenizer.apply_chat_template([*messages[:-1], spoken], tokenize=False)
        positions.append(len(tokenizer(text.split("<|audio|>")[0], add_special_tokens=False)["input_ids"]))
        if len(positions) == limit:
            break
    return positions


def describe_table(rows: list[dict], positions: list[int] | None = None) -> str:
    """All of it as text."""
    records = count(rows)
    lines = [
        f"{'corpus':<20}{'split':<12}{'rows':>8}{'audio':>8}{'hours':>9}{'speakers':>10}{'dialogues':>11}{'responses':>11}"
    ]
    lines += [
        f"{r['corpus']:<20}{r['split']:<12}{r['rows']:>8,}{r['audio']:>8,}{r['hours']:>9.2f}{r['speakers']:>10,}"
        f"{r['dialogues']:>11,}{r['responses']:>11,}"
        for r in records
    ]
    lines.append(
        f"{'all':<32}{sum(r['rows'] for r in records):>8,}{sum(r['audio'] for r in records):>8,}"
        f"{sum(r['hours'] for r in records):>9.2f}"
    )
    lines.append("")
    for name in ATTRIBUTES:
        labels = Counter(row[name] for row in rows)
        unknown = labels.pop(None, 0)
        shares = ", ".join(f"{label} {n:,} ({n / sum(labels.values()):.0%})" for label, n in labels.most_common())
        lines.append(f"{name:<10}{shares or '-'}" + (f"; unknown {unknown:,}" if unknown else ""))
    if positions:
        quantiles = np.quantile(positions, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).round().astype(int)
        lines.append("")
        lines.append(
            "first speech embedding at token "
            + ", ".join(
                f"{n} ({name})"
                for n, name in zip(quantiles, ("least", "5 %", "25 %", "median", "75 %", "95 %", "most"), strict=True)
            )
        )
    found, known = leaks(rows)
    lines.append("")
    lines += [f"LEAK  {leak}" for leak in found] or ["no leaks: no speaker, dialogue or audio file is in two splits"]
    lines += [f"note  {note}" for note in known]
    return "\n".join(lines)


def plot_table(rows: list[dict], path: str | Path, positions: list[int] | None = None, title: str = "") -> None:
    """All of it as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"train": "#4477aa", "validation": "#ccbb44", "test": "#ee6677"}
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    if title:
        figure.suptitle(title)
    records = count(rows)
    names = sorted({r["corpus"] for r in records}, reverse=True)
    hours = any(r["hours"] for r in records)

    axis, left = axes[0, 0], dict.fromkeys(names, 0.0)
    for split in SPLITS:
        value = {r["corpus"]: r["hours"] if hours else r["rows"] for r in records if r["split"] == split}
        axis.barh(names, [value.get(n, 0) for n in names], left=list(left.values()), color=colours[split], label=split)
        left = {n: left[n] + value.get(n, 0) for n in names}
    sizes = {name: sum(r["rows"] for r in records if r["corpus"] == name) for name in names}
    axis.set_yticks(range(len(names)), [f"{name}\n{sizes[name]:,} rows" for name in names])
    axis.legend()
    axis.set(title="hours" if hours else "rows", xlabel="hours" if hours else "rows")

    axis = axes[0, 1]
    for place, name in enumerate(reversed(ATTRIBUTES[:4])):
        labels, start = Counter(row[name] for row in rows if row[name] is not None), 0.0
        order = [label for label in ("female", "male", "slow", "low", "normal", "fast", "high") if label in labels]
        for shade, label in enumerate(order):
            width = labels[label] / sum(labels.values())
            axis.barh(place, width, left=start, color=plt.cm.viridis(0.25 + 0.3 * shade))
            axis.text(
                start + width / 2,
                place,
                f"{label}\n{width:.0%}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if shade == 0 else "black",
            )
            start += width
    axis.set(title="labels", yticks=range(4), yticklabels=list(reversed(ATTRIBUTES[:4])), xlim=(0, 1))

    axis = axes[0, 2]
    emotions = Counter(row["emotion"] for row in rows)
    unknown = emotions.pop(None, 0)
    ordered = emotions.most_common()[::-1]
    axis.barh([name for name, _ in ordered], [n for _, n in ordered], color="#66ccee")
    axis.set(title=f"emotions ({unknown:,} rows unknown)", xlabel="rows")

    axis = axes[1, 0]
    durations = [row["duration"] for row in rows if row["duration"]]
    if durations:
        axis.hist(np.clip(durations, 0, 20), bins=40, color="#4477aa")
        axis.set(title=f"length of clips (median {np.median(durations):.1f} s)", xlabel="seconds (20: or longer)")
    else:
        axis.set(title="no audio")

    axis = axes[1, 1]
    column = MEASURED["pitch"]
    for gender, colour in (("female", "#aa3377"), ("male", "#228833"), (None, "#bbbbbb")):
        values = [row[column] for row in rows if row[column] and row["gender"] == gender]
        if values:
            axis.hist(values, bins=40, range=(60, 400), color=colour, alpha=0.6, label=gender or "gender unknown")
    if axis.has_data():
        axis.legend()
        axis.set(title="mean pitch", xlabel="Hz")
    else:
        axis.set(title="pitch not measured (corpus label)")

    axis = axes[1, 2]
    if positions:
        axis.hist(positions, bins=40, color="#ee6677")
        axis.set(title="where the first speech embedding is", xlabel="tokens before it")
    else:
        turns = Counter(len(row["history"]) for row in rows)
        axis.bar(list(turns), list(turns.values()), color="#ee6677")
        axis.set(title="turns before the spoken one", xlabel="turns")
    figure.savefig(path, dpi=110)
    plt.close(figure)
