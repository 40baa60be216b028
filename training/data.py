"""Loads the rows of a recipe: its tables, or a small corpus that is synthesised, with the frozen LLM's responses."""

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..configuration_dual_slm import DualSLMConfig
from .alignment import Aligner, AlignmentConfig, align_rows
from .attributes import Thresholds, label_row, measure_rows, tertiles, write_thresholds
from .augmentation import augmented
from .corpora.checks import Report, check_rows
from .corpora.folder import read
from .corpora.row import Row
from .corpora.synthesis import build, read_texts
from .corpora.table import read_table, write_table
from .files import Journal, read_lines
from .labels import ATTRIBUTES
from .recipe import Recipe
from .tasks import cut_history, lend_histories, tasks_of


@dataclass
class Data:
    """Rows with audio, by split."""

    train: list[Row]  # with augmented copies
    validation: list[Row]
    fingerprint: str  # SHA-256 of ids, splits, transcripts, responses and labels
    words: list[Row]  # more clips with transcripts, for stage 0 alone
    lines: list[str]  # texts whose words and bigrams extend the decoding lexicon


def load_data(recipe: Recipe, folder: Path, config: DualSLMConfig, device: str = "cpu") -> Data:
    """Rows of the recipe's tables, or of a small corpus that is synthesised into the run's folder.

    Histories are cut and the frozen LLM answers rows that have no response of its own yet, if the recipe asks for it.

    Args:
        folder: of the run, which keeps the corpus and the responses.
        config: of the model: its LLM answers, its `attribute_thresholds` label augmented copies.

    Raises:
        FileNotFoundError: audio files are gone since the tables were made.
        ValueError: no row of train or validation, or none for a corpus and task of a stage.
    """
    args, tables = recipe.data, [Path(table) for table in recipe.data.tables]
    if args.synthesise_hours > 0:
        tables.append(_synthesised(recipe, folder))
    rows = [row for row in read_table(*tables) if row.split in ("train", "validation")]
    rows = _with_audio(rows, args.skip_damaged)
    stage_0 = recipe.stage_0
    words = read_table(*stage_0.tables) if stage_0.tables else []
    words = _with_audio([row for row in words if row.split == "train"], args.skip_damaged)
    lines = read_lines(stage_0.lexicon)
    splits = {row.split for row in rows}
    if splits != {"train", "validation"}:
        raise ValueError(
            f"the tables have rows of {' and '.join(splits) or 'no split'}, and training needs train and validation: give "
            "each row its `split` in the metadata."
        )
    _tell_unknown_labels(rows, config)
    if args.histories:
        rows = list(lend_histories(rows, read_table(*args.histories), recipe.train.seed))
    rows = list(cut_dialogues(rows, recipe))
    check_mapping(rows, recipe)
    rows = _with_responses(rows, recipe, folder, config, device)
    train = [row for row in rows if row.split == "train"]
    validation = [row for row in rows if row.split == "validation"]
    repeated = (corpus for stage in recipe.stages for corpus in stage.repeat)
    if unknown := {*args.augment, *args.revoice, *repeated} - {row.corpus for row in train}:
        told = "no training row is of a corpus that augment, revoice or repeat names"
        print(f"{told}: {', '.join(sorted(unknown))}", flush=True)
    thresholds = Thresholds(**config.attribute_thresholds) if config.attribute_thresholds else None
    train += [  # copies in other voices have the last numbers
        augmented(row, number, thresholds, revoice=number > args.augment.get(row.corpus, 0))
        for row in train
        for number in range(1, args.copies(row) + 1)
    ]
    return Data(train, validation, _fingerprint(rows + words, lines), words, lines)


def environment(data: Data) -> dict[str, Any]:
    """Machine, packages and data of a run."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors", "dual-slm")
    return {
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in packages},
        "data": {"rows": data.fingerprint, "train": len(data.train), "validation": len(data.validation)},
    }


def _with_audio(rows: list[Row], skip_damaged: bool) -> list[Row]:
    """The rows whose audio file exists."""
    if silent := [row.id for row in rows if row.audio is None]:
        print(f"{len(silent):,} rows have no audio and are left out, the first is {silent[0]}", flush=True)
    gone = {row.key: row for row in rows if row.audio is not None and not Path(row.audio).is_file()}
    if gone and not skip_damaged:
        first = next(iter(gone.values()))
        raise FileNotFoundError(
            f"{len(gone):,} audio files are gone since the tables were made, the first is {first.audio} of the row "
            f"{first.id}. Restore them, or set data.skip_damaged to leave such rows out."
        )
    for row in gone.values():
        print(f"left out, its audio is gone: {row.id} ({row.audio})", flush=True)
    return [row for row in rows if row.audio is not None and row.key not in gone]


def _tell_unknown_labels(rows: list[Row], config: DualSLMConfig) -> None:
    for name, labels in (config.attribute_labels or {}).items():
        if other := {row.label(name) or "" for row in rows} - {"", *labels}:
            told = f"the voice will not be taught the {name} {', '.join(sorted(other))}"
            print(f"{told}: model.config.attribute_labels has {', '.join(labels)}", flush=True)


def cut_dialogues(rows: Iterable[Row], recipe: Recipe) -> Iterator[Row]:
    """The rows and, if `data.cut_histories`, a copy with a shorter history of each training row that learns a dialogue.

    A copy is to be answered anew where the LLM answers. A row that is such a copy already is a ValueError.
    """
    anew: dict[str, Any] = {"response_complete": None} if recipe.data.align_responses else {}
    for row in rows:
        yield row
        if recipe.data.cut_histories and row.split == "train" and row.history and recipe.learns_dialogues(row.corpus):
            if re.search(r"/last\d+$", row.id):
                raise ValueError(
                    f"data.cut_histories is true, and the row {row.id} of {row.corpus} has been cut by `dual-slm align "
                    "--cut`: leave out one of the two."
                )
            yield cut_history(row, recipe.train.seed).replace(**anew)


def check_mapping(rows: Iterable[Row], recipe: Recipe) -> None:
    """Raises `ValueError` if no training row is of a corpus that a stage names, or has a target for its task."""
    known: dict[str, set[str]] = {}
    for row in rows:
        if row.split == "train":
            answered = ["dialogue"] if recipe.data.align_responses and row.transcript else []
            known.setdefault(row.corpus, set()).update(tasks_of(row), answered)
    for stage in recipe.stages:
        for corpus, tasks in stage.tasks.items() if stage.by_corpus else ():
            if corpus not in known:
                raise ValueError(
                    f"stage {stage.name}: tasks has {corpus!r}, and no training row is of that corpus; there are "
                    f"{', '.join(sorted(known))}. Add its table to data.tables, or leave it out of tasks."
                )
            if lacking := set(tasks) - known[corpus]:
                raise ValueError(
                    f"stage {stage.name}: no training row of {corpus} has a target for {', '.join(sorted(lacking))}. Label "
                    f"the table (`dual-slm corpus label`), or leave it out of tasks.{corpus}."
                )


def _with_responses(rows: list[Row], recipe: Recipe, folder: Path, config: DualSLMConfig, device: str) -> list[Row]:
    """The rows with the frozen LLM's responses where they have none of it, if a stage learns dialogues of their corpus."""
    unanswered = [row for row in rows if to_answer(row, recipe)]
    if not unanswered:
        return rows
    path = folder / "responses.parquet"
    if not path.is_file():
        alignment = AlignmentConfig(**{"seed": recipe.train.seed, **recipe.data.alignment})
        aligner, report = Aligner(str(config.text_model_id), alignment, recipe.model.dtype, device), Report()
        write_table(align_rows(unanswered, aligner, Journal(folder / "replies.jsonl"), report), path)
        print(report, flush=True)
    names = ("system", "response", "response_complete")
    answers = {row.key: {name: getattr(row, name) for name in names} for row in read_table(path)}
    return [row.replace(**answers.get(row.key, {})) for row in rows]


def to_answer(row: Row, recipe: Recipe) -> bool:
    """Whether the frozen LLM answers a row of train or validation."""
    wanted = recipe.data.align_responses and recipe.learns_dialogues(row.corpus)
    return wanted and row.response_complete is None and bool(row.transcript)


def _fingerprint(rows: list[Row], lines: list[str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        labels = [row.label(name) for name in ATTRIBUTES]
        digest.update(f"{row.id}\t{row.split}\t{row.transcript}\t{row.response}\t{labels}\n".encode())
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()


def _synthesised(recipe: Recipe, folder: Path) -> Path:
    """Table of a corpus that is synthesised, measured and labelled; what is there is not made again."""
    table, corpus, report = folder / "corpus.parquet", folder / "corpus", Report()
    if table.is_file():
        return table
    if not (corpus / "metadata.jsonl").is_file():
        engines = tuple(recipe.data.synthesise_engines)
        build(read_texts(None), corpus, recipe.data.synthesise_hours, recipe.train.seed, engines=engines)
    rows = list(check_rows(read(corpus, report), report))
    if len({row.split for row in rows}) < 3:  # too few voices for splits by voice: by voice and vocal tract
        rows = [row.replace(split=_split_of(str(row.speaker))) for row in rows]
    rows = list(measure_rows(rows, Journal(folder / "measured.jsonl"), report))
    thresholds = tertiles(rows)
    write_thresholds(thresholds, folder / "thresholds.json")
    write_table((label_row(row, {"all": thresholds["all"]}, recipe.train.seed) for row in rows), table)
    if report:
        print(report, flush=True)
    return table


def _split_of(speaker: str) -> str:
    tenths = ("train",) * 8 + ("validation", "test")
    return tenths[int(hashlib.sha256(speaker.encode()).hexdigest(), 16) % 10]
