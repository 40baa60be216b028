"""Reports for people: report.html with its picture, a section of a model card, and Markdown tables."""

import base64
import io
import random
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import ASSETS, read_json, replace_section, write_json, write_text
from ..labels import KINDS
from .figures import HEADLINE, PLACE, SUMMARY, FigureRecord, compare, pivots, show
from .records import Record, read_records
from .tables import OFFICIAL, paper_tables

Report = dict[str, Any]  # what report.json holds
CARD_WARNINGS = 8
OFFICIAL_SPLITS = ("meld", "styletalk")  # corpora whose readers keep the official test split
SECTION = ("<!-- evaluation: written by dual-slm evaluate -->", "<!-- end of evaluation -->")


def write_report(folder: Path, report: Report, records: list[Record]) -> None:
    """Writes report.json, report.html and, for the suite `disentanglement`, disentanglement.png."""
    write_json(folder / "report.json", report)
    picture = draw(report["figures"])
    write_text(folder / "report.html", page(report, records, picture))
    if picture:
        (folder / "disentanglement.png").write_bytes(picture)


def page(report: Report, records: list[Record], picture: bytes | None, examples: int = 4) -> str:
    """The self-contained HTML page.

    Args:
        picture: PNG of `draw`.
        examples: number of replies that are shown for each suite.
    """
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True)
    environment.filters["ogg"] = _ogg
    suites = []
    for name in report["suites"]:
        tables = pivots([f for f in report["figures"] if f["suite"] == name])
        first = [table for table in tables if table.title.startswith(tuple(f"{name}: {m}" for m in HEADLINE))]
        own = [r for r in records if r["suite"] == name and r.get("prompt")]
        suite = {"name": name, "headlines": first, "others": [table for table in tables if table not in first]}
        suite["picture"] = base64.b64encode(picture).decode() if picture and name == "disentanglement" else None
        suite["confusions"] = [entry for entry in report["confusions"] if entry["suite"] == name]
        suites.append(suite | {"examples": random.Random(0).sample(own, min(examples, len(own)))})
    name = "/".join(Path(report["setup"]["system"]).parts[-2:])
    return environment.get_template("report.html.jinja").render(report | {"name": name, "suites": suites}, show=show)


def _ogg(path: str | None, seconds: float = 8.0) -> str:
    """The first seconds of a clip as Ogg Vorbis in base64; empty if there is no such file."""
    import soundfile

    from ...audio_dual_slm import load_audio

    if not path or not Path(path).is_file():
        return ""
    buffer = io.BytesIO()
    soundfile.write(buffer, load_audio(path)[: int(16_000 * seconds)], 16_000, format="OGG", subtype="VORBIS")
    return base64.b64encode(buffer.getvalue()).decode()


def draw(figures: list[FigureRecord]) -> bytes | None:
    """PNG of the suite `disentanglement`: accuracy of each task under each condition; None without such figures."""
    from matplotlib.figure import Figure

    wanted, shares = ["P&L", "P only", "L only", "none", "swap"], {}
    for f in figures:
        right = {"accuracy": f["value"], "WER": max(0.0, 1 - f["value"])}.get(f["metric"])
        ours = f["suite"] == "disentanglement" and f["condition"] in wanted and "," not in f["task"]
        if ours and right is not None:
            place = (f["task"] != "asr", f["corpus"], f"{f['task']}\n{f['corpus']}", f["condition"])
            shares[place] = 100 * right
    if not shares:
        return None
    table: Any = pd.Series(shares).unstack().reindex(columns=wanted).droplevel([0, 1])
    figure = Figure(figsize=(max(7, 1.3 * len(table)), 4.2), layout="constrained")
    axis = figure.subplots()
    table.plot.bar(ax=axis, width=0.8, rot=0, fontsize=8, xlabel="", ylabel="% right (asr: 100 - WER)", ylim=(0, 105))
    axis.set_title("Which branch carries what")
    axis.legend(ncols=len(wanted), fontsize=8, loc="upper center")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def markdown(figures: list[FigureRecord], wanted: tuple[str, ...] = HEADLINE) -> str:
    """The paper's tables, then the headline figures of each suite, as Markdown."""
    lines = []
    for table in [*paper_tables(figures), *pivots(figures, wanted)]:
        lines += ["", f"**{table.title}** (95 % interval over speakers)", "", *_table(table.head, table.rows)]
    return "\n".join(lines).strip()


def compared(first: str | Path, second: str | Path) -> str:
    """Paired differences of two evaluations, as Markdown.

    Raises:
        ValueError: the evaluations have no sample in common.
    """
    differences = compare(read_records(first), read_records(second))
    if not differences:
        raise ValueError(f"{first} and {second} have no sample in common.")
    rows = []
    for d in differences:
        if d["metric"] in SUMMARY or d["judge"]:
            a, b, gap = (show(d[name], d["metric"]) for name in ("first", "second", "difference"))
            if d["low"] is not None:
                gap += f" ({show(d['low'], d['metric'])} to {show(d['high'], d['metric'])})"
            where = ", ".join(d[name] for name in PLACE if d[name])
            rows.append([where, d["metric"], a, b, gap, str(d["samples"])])
    head = ["suite, corpus, task, condition", "figure", str(first), str(second), "difference (95 %)", "samples"]
    return "\n".join(_table(head, rows))


def averaged(folders: list[str | Path]) -> str:
    """Mean and standard deviation of the headline figures over several evaluations (seeds), as Markdown.

    The last rows are, for each suite, the mean over all attributes of all corpora.

    Raises:
        FileNotFoundError: a folder holds no finished evaluation.
    """
    figures = []
    for run, folder in enumerate(folders):
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished evaluation (report.json).")
        figures += [f | {"run": run} for f in read_json(path)["figures"] if f["metric"] in SUMMARY]
    place = ["suite", "corpus", "task", "metric", "condition"]
    frame: Any = pd.DataFrame(figures, columns=[*place, "run", "value"])
    values: Any = frame.pivot(index=place, columns="run", values="value")  # a column for each evaluation
    values = values.reindex(pd.MultiIndex.from_frame(frame[place].drop_duplicates()))
    attributes = [KINDS.get(task) == "paralinguistic" for task in values.index.get_level_values("task")]
    means = values[attributes].dropna().groupby(["suite", "metric", "condition"], sort=False)
    for (suite, metric, condition), rows in means:
        if len(rows) > 1:
            values.loc[suite, "mean", f"{len(rows)} attributes", metric, condition] = rows.mean()
    cells: dict[tuple, dict[str, str]] = {}
    for (*where, metric, condition), row in values.iterrows():
        found = row.dropna()
        text = show(found.mean(), metric) + (f" ± {show(found.std(), metric)}" if len(found) > 1 else "")
        cells.setdefault((*where, metric), {})[condition] = text
    conditions = values.index.unique("condition")
    head = f"{len(folders)} evaluations: mean ± standard deviation (% but for losses)"
    rows = [[", ".join(where), *(found.get(name, "") for name in conditions)] for where, found in cells.items()]
    return "\n".join(_table([head, *conditions], rows))


def write_card(folder: Path, report: Report) -> None:
    """Writes the figures into the folder's README.md: as `model-index` metadata, and as the section "Evaluation"."""
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    card = ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else ModelCard("---\n---\n")
    known = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    card.data = ModelCardData(**known, model_name=folder.resolve().name, eval_results=_results(report))
    warnings = report["warnings"]
    lines = [markdown(report["figures"]), "", *(f"- {warning}" for warning in warnings[:CARD_WARNINGS])]
    if len(warnings) > CARD_WARNINGS:
        lines.append(f"- and {len(warnings) - CARD_WARNINGS} more warnings in the report.")
    card.text = replace_section(card.text, SECTION, "\n".join(lines), "Evaluation")
    card.save(path)


def _is_official(corpus: str, task: str) -> bool:
    """Whether the rows of a split are those that the corpus itself holds out."""
    return corpus in OFFICIAL_SPLITS or task.startswith(OFFICIAL)


def _data_name(corpus: str, task: str, split: str) -> str:
    if task.startswith(OFFICIAL):  # "asr, test-clean"
        return f"{corpus} {task.removeprefix('asr, ')}"
    return f"{corpus}, {task}" if corpus in OFFICIAL_SPLITS else f"held-out {corpus} speakers ({split}), {task}"


def _results(report: Report) -> list:
    """The figures of the conditions P&L and heard as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    results, split = [], report["setup"]["split"]
    for figure in report["figures"]:
        suite, corpus, task, condition, _ = (figure[name] for name in PLACE)
        # `hearing` asks all clips, other suites only those that replies were asked for.
        direct = condition == "heard" and (suite == "hearing" or "hearing" not in report["suites"])
        wanted = suite in ("hearing", "asr", "attributes", "meld") and (condition == "P&L" or direct)
        metric = figure["metric"]
        if wanted and metric in ("WER", "accuracy", "unweighted accuracy", "weighted F1"):
            results.append(
                EvalResult(
                    task_type="automatic-speech-recognition" if task.startswith("asr") else "audio-classification",
                    task_name=task,
                    dataset_type=corpus,
                    dataset_name=_data_name(corpus, task, split),
                    dataset_config=task,  # otherwise the Hub merges the results of one data set
                    dataset_split=split if _is_official(corpus, task) else f"{split} speakers",
                    metric_type="wer" if metric == "WER" else metric.replace(" ", "_"),
                    metric_name=f"{metric} %, {condition}",
                    metric_value=round(100 * figure["value"], 1),
                )
            )
    return results
