"""Tables I to IV in the paper's form (section V), from the figures of an evaluation.

Only replies count: what is heard before the LLM has no place in them. The paper calls the conditions P&L-Embs, P-Embs and
L-Embs. Its weighted accuracy (WA) is the share of right replies; a reply that names no label, or several, is wrong.
"""

from collections import defaultdict
from collections.abc import Iterable

from ..labels import ATTRIBUTES
from .context import ASSET
from .figures import BOTH_ROLES, ROLES, FigureRecord, Pivot, cell, show
from .judges import CITED, SYSTEM

EMBS = {"P&L": "P&L-Embs", "P only": "P-Embs", "L only": "L-Embs"}
ROLE_NAMES = {ROLES[0]: "styletalk, user's turn", ROLES[1]: "styletalk, roles reversed", BOTH_ROLES: BOTH_ROLES}
OFFICIAL = ("asr, dev-", "asr, test-")  # begin the tasks of the subsets that LibriSpeech holds out
Rows = dict[tuple[str, str], dict[str, str]]  # (corpus, condition) -> column -> text


def paper_tables(figures: list[FigureRecord]) -> list[Pivot]:
    """The paper's tables for which the suites and corpora of an evaluation have figures."""
    replies = "WA % (of all replies; unparsed ones are wrong)"
    first, second = f"paper, Table I: attributes, {replies}", f"paper, Table II: emotion on MELD, {replies}"
    tables = [
        _pivot(first, ATTRIBUTES, _labels(figures, "attributes", ATTRIBUTES, ("P&L", "P only"))),
        _pivot(second, ("emotion",), _labels(figures, "meld", ("emotion",), ("P&L",))),
    ]
    words = _words(figures)
    subsets = sorted({subset for texts in words.values() for subset in texts})
    tables.append(_pivot("paper, Table III: ASR, WER %", subsets, words))
    scores = [f"{wording} {criterion}" for wording in CITED for criterion in ASSET["judges"][wording]["criteria"]]
    for judge in dict.fromkeys(f["judge"] for f in figures if f["judge"]):
        texts = _conversations([f for f in figures if f["judge"] == judge and f["suite"] == "conversation"], scores)
        tables.append(_pivot(f"paper, Table IV: judge {judge}", [*scores, "turns", "unread answers %"], texts))
    return [table for table in tables if table.rows]


def _pivot(title: str, columns: Iterable[str], rows: Rows) -> Pivot:
    """Rows in order of the corpora, the paper's conditions and the other systems."""
    corpora, conditions = [*ROLE_NAMES], [*EMBS]

    def order(place: tuple[str, str]) -> tuple:
        corpus, condition = place
        known = corpora.index(corpus) if corpus in corpora else -1
        return known, corpus, conditions.index(condition) if condition in conditions else len(conditions), condition

    columns, lines = list(columns), []
    for place in sorted(rows, key=order):
        corpus, condition = place
        label = f"{ROLE_NAMES.get(corpus, corpus)}, {EMBS.get(condition, condition.removeprefix(SYSTEM))}"
        lines.append([label, *(rows[place].get(column, "–") for column in columns)])
    return Pivot(title, ["corpus, system or condition", *columns], lines)


def _labels(figures: list[FigureRecord], suite: str, tasks: tuple[str, ...], conditions: tuple[str, ...]) -> Rows:
    rows: Rows = defaultdict(dict)
    own = [f for f in figures if f["suite"] == suite and f["task"] in tasks and f["condition"] in conditions]
    lost = {(f["corpus"], f["task"], f["condition"]): f["value"] for f in own if f["metric"] == "unparsed"}
    for f in own:
        if f["metric"] == "accuracy":
            unparsed = show(lost[f["corpus"], f["task"], f["condition"]], "unparsed")
            rows[f["corpus"], f["condition"]][f["task"]] = f"{cell(f)}, unparsed {unparsed}"
    return rows


def _words(figures: list[FigureRecord]) -> Rows:
    rows: Rows = defaultdict(dict)
    for f in figures:
        asked = f["suite"] == "asr" and f["metric"] == "WER" and f["condition"] in ("P&L", "L only")
        if asked and f["task"].startswith(OFFICIAL):
            rows[f["corpus"], f["condition"]][f["task"].removeprefix("asr, ")] = f"{cell(f)}, {f['samples']:,} clips"
    return rows


def _conversations(figures: list[FigureRecord], scores: list[str]) -> Rows:
    """Scores of the system under P&L and of the other systems; the share of answers that could not be read."""
    rows: Rows = defaultdict(dict)
    lost: dict[tuple[str, str], float] = defaultdict(float)
    for f in figures:
        place, metric = (f["corpus"], f["condition"]), f["metric"].removesuffix(", unparsed")
        if metric not in scores or not (f["condition"] == "P&L" or f["condition"].startswith(SYSTEM)):
            continue
        if metric == f["metric"]:
            rows[place] |= {metric: cell(f), "turns": f"{f['samples']:,}"}
        else:
            lost[place] = max(lost[place], f["value"])
            rows[place]["unread answers %"] = show(lost[place], "unparsed")
    return rows
