"""Writes the prompts of an evaluation to a file, for a system elsewhere. `systems.Replies` reads its replies."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..augmentation import load_clip
from ..corpora.row import Variant
from ..corpora.table import read_table
from ..files import Journal, atomic, write_text
from .benchmarks import Question
from .evaluate import make_context, suites_of
from .suites import SUITES
from .systems import Query, System


class Elsewhere(System):
    """A system that is asked by a file: its conditions are those of `Replies`."""

    name, conditions = "elsewhere", ("P&L",)

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        return iter(())


def write_prompts(
    path: str | Path,
    tables: list[str],
    suites: Iterable[str] = ("all",),
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    questions: Sequence[Question] = (),
) -> list[str]:
    """Writes one JSON object for each question that `evaluate` asks a file of replies with the same arguments.

    Its keys: key, suite, condition, task, corpus, id, audio, messages, max_new_tokens. The messages hold neither the
    transcript nor the answer. Clips that exist in no file, such as those at equal loudness, go into a folder named after
    `path` without its suffix.

    Returns:
        The notes of the suites: what is not asked, and why.
    """
    path = Path(path)
    folder = path.with_suffix("")
    setup: dict[str, Any] = {"split": split, "limit": limit, "seed": seed, "thresholds": None}
    table, journal = read_table(*tables) if tables else [], Journal(folder / "replies.jsonl")
    context = make_context(Elsewhere(), table, setup, folder, journal, questions)
    queries = {query.key: query for suite in suites_of(suites, tables, questions) for query in SUITES[suite](context)}
    lines = (json.dumps(_line(query, folder), ensure_ascii=False) + "\n" for query in queries.values())
    write_text(path, "".join(lines))
    print(f"{path}: {len(queries):,} prompts")
    return list(dict.fromkeys(context.notes))


def _line(query: Query, folder: Path) -> dict[str, Any]:
    row, audio = query.row, Path(str(query.row.audio)).resolve()
    if row.variant != Variant():
        import soundfile

        audio = folder.resolve() / f"{hashlib.sha256(query.key.encode()).hexdigest()[:16]}.wav"
        with atomic(audio) as part:
            soundfile.write(part, load_clip(row), 16_000, format="WAV", subtype="FLOAT")
    texts = dict.fromkeys(("transcript", "caption", "paralinguistic", "linguistic"))
    messages = query.sample.with_spoken(path=str(audio), **texts).messages
    named = {"key": query.key, "suite": query.suite, "condition": query.condition, "task": query.sample.task}
    return named | {
        "corpus": row.corpus,
        "id": row.id,
        "audio": str(audio),
        "messages": messages,
        "max_new_tokens": query.max_new_tokens,
    }
