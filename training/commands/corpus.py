"""`dual-slm corpus`: build, read, folds, label, stats, overlap and show."""

import argparse
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..corpora import CORPORA
from .common import add_command, check_checkpoint_name, default_checkpoint

if TYPE_CHECKING:
    from ..tasks import Sample


def register(subparsers) -> None:
    text = "Corpora as tables of conversations."
    corpus = subparsers.add_parser("corpus", help="make, read and inspect corpora", description=text)
    names = "build | read | folds | label | stats | overlap | show"
    commands = corpus.add_subparsers(dest="corpus", required=True, metavar=names)

    parser = add_command(commands, "build", build)
    parser.add_argument("--out", metavar="DIR", help="folder that `corpus read folder` reads")
    parser.add_argument("--texts", help="sentences, one a line, or a table (default: 500 of LibriSpeech)")
    parser.add_argument("--hours", type=float, help="of audio (default: 0.5, or all rows of a table)")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--engines", nargs="+", help="synthesisers whose voices speak (default: all)")
    parser.add_argument("--list-voices", action="store_true", help="list the voices with their licences")

    parser = add_command(commands, "read", read)
    parser.add_argument("name", choices=CORPORA, help=". ".join(f"{name}: {c.summary}" for name, c in CORPORA.items()))
    parser.add_argument("--root", required=True, help="where the corpus was unpacked")
    parser.add_argument("--out", required=True, metavar="TABLE", help="Parquet file")
    parser.add_argument("--allow-missing-audio", action="store_true", help="keep rows without audio as text")
    parser.add_argument("--role-reversed", action="store_true", help="StyleTalk: add the test with exchanged roles")
    parser.add_argument("--fold", type=int, help="IEMOCAP: the test session, 1 to 5 (default 1)")

    parser = add_command(commands, "folds", folds)
    parser.add_argument("table", help="Parquet file of `corpus read`")
    parser.add_argument("--folds", type=int, default=4, help="number of folds")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of fold-1.parquet and the others")

    parser = add_command(commands, "label", label)
    parser.add_argument("table", help="Parquet file of `corpus read`")
    parser.add_argument("--out", metavar="TABLE", help="default: the table itself")
    parser.add_argument("--thresholds", default="textrolspeech", help="textrolspeech, tertiles, or a .thresholds.json")
    parser.add_argument("--overwrite", action="store_true", help="also replace the corpus's own labels and captions")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws")
    parser.add_argument("--processes", type=int, help="default: one a core")

    parser = add_command(commands, "stats", stats)
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="Parquet files of `corpus read`")
    parser.add_argument("--out", metavar="PNG", help="default: beside the first table")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="the LLM whose tokens count positions")
    parser.add_argument("--check", action="store_true", help="exit with 1 if two splits share a speaker or dialogue")

    parser = add_command(commands, "overlap", overlap)
    parser.add_argument("test", metavar="TEST", help="table whose validation and test rows are compared")
    parser.add_argument("--train", nargs="+", required=True, metavar="TABLE", help="tables whose training rows count")
    text = "text files that were trained on too, such as those of warm_start.lexicon"
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help=text)
    parser.add_argument("--checkpoint", help="folder or Hub id whose lexicon is compared too (type `letters`)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    parser = add_command(commands, "show", show)
    parser.add_argument("table", help="Parquet file of `corpus read`")
    parser.add_argument("--model", help="checkpoint whose processor makes the batch")
    parser.add_argument("--task", help="asr, gender, pitch, tempo, energy, emotion or dialogue")
    parser.add_argument("--split", default="train", help="the split of the rows")
    parser.add_argument("--count", type=int, default=4, help="number of rows")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws")
    parser.add_argument("--epoch", type=int, default=0, help="prompts are drawn anew in each epoch")


def build(args: argparse.Namespace) -> None:
    """Synthesise a small complete corpus. Synthesisers speak sentences, or the rows of a table."""
    from ..corpora.synthesis import build as build_corpus
    from ..corpora.synthesis import read_texts
    from ..corpora.voices import ENGINES, VOICES

    if args.list_voices:
        for v in VOICES:
            print(f"{v.engine:10} {v.name:20} {v.gender:7} {v.split:11} {v.share:4.0%}  {v.licence}")
        return
    if args.out is None:
        raise ValueError("--out DIR says where the corpus is made.")
    texts = read_texts(args.texts)
    hours = args.hours if args.hours is not None or (texts and not isinstance(texts[0], str)) else 0.5
    print(build_corpus(texts, args.out, hours, args.seed, args.processes, tuple(args.engines or ENGINES)))


def read(args: argparse.Namespace) -> None:
    """Read a corpus from its own files into a table. The table refers to the audio files."""
    from ..corpora import reader
    from ..corpora.checks import Report, check_rows
    from ..corpora.table import write_table

    root, out = Path(os.path.abspath(args.root)), Path(args.out)  # whole paths, so that the table works from anywhere
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: --root is where the corpus was unpacked.")
    if args.role_reversed and args.name != "styletalk":
        raise ValueError(f"--role-reversed is StyleTalk's second test, not {args.name}'s.")
    if args.fold is not None and args.name != "iemocap":
        cure = "others are cut by `dual-slm corpus folds`"
        raise ValueError(f"--fold is for IEMOCAP, whose sessions are the folds; {cure}.")
    options: dict = {"role_reversed": True} if args.role_reversed else {}
    options |= {} if args.fold is None else {"fold": args.fold}
    report = Report()
    rows = reader(args.name)(root, report, **options)
    rows = check_rows(rows, report, args.allow_missing_audio, out.with_suffix(".audio"))
    count = write_table(rows, out, progress=args.name)
    if report:
        print(report)
    print(f"{count:,} rows in {out}")


def folds(args: argparse.Namespace) -> None:
    """Write a table for each fold of a cross-validation over speakers. The table's own test speakers are in no fold."""
    from ..corpora.folds import cross_validated
    from ..corpora.table import read_table, write_table
    from ..labels import SPLITS

    for number, rows in enumerate(cross_validated(read_table(args.table), args.folds), 1):
        path = Path(args.out) / f"fold-{number}.parquet"
        write_table(rows, path)
        names = {split: sorted({str(row.speaker) for row in rows if row.split == split}) for split in SPLITS}
        print(f"{path}: " + "; ".join(f"{split} {', '.join(those)}" for split, those in names.items()))


def label(args: argparse.Namespace) -> None:
    """Measure pitch, energy and tempo of each clip, label them and write captions. Works in place without --out."""
    from ..attributes import Thresholds, label_row, measure_rows, read_thresholds, tertiles, write_thresholds
    from ..corpora.checks import Report
    from ..corpora.table import read_table, write_table
    from ..files import Journal

    out, report = Path(args.out or args.table), Report()
    journal, borders_file = Journal(f"{out}.measured.jsonl"), out.with_suffix(".thresholds.json")
    rows = list(measure_rows(list(read_table(args.table)), journal, report, args.processes))
    if args.thresholds == "textrolspeech":
        thresholds = {"all": Thresholds()}
    else:
        thresholds = tertiles(rows) if args.thresholds == "tertiles" else read_thresholds(args.thresholds)
    count = write_table((label_row(row, thresholds, args.seed, args.overwrite) for row in rows), out)
    write_thresholds(thresholds, borders_file)
    journal.remove()
    if report:
        print(report)
    for gender, borders in thresholds.items():
        print(f"{gender}: pitch {borders.pitch} Hz, energy {borders.energy} RMS, tempo {borders.tempo} s a word")
    print(f"{count:,} rows in {out}, borders in {borders_file}")


def stats(args: argparse.Namespace) -> None:
    """Print counts, hours, labels, speakers, leaks between splits and the positions of speech, and draw them."""
    from transformers import AutoTokenizer

    from ...backbones_dual_slm import resolve_backbone
    from ..corpora.table import read_table
    from ..stats import describe_table, first_speech_positions, leaks, plot_table

    rows = list(read_table(*args.tables))
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(args.tokenizer))
    positions = first_speech_positions(rows, tokenizer)
    print(describe_table(rows, positions))
    out = Path(args.out or Path(args.tables[0]).with_suffix(".png"))
    plot_table(rows, out, positions, title=", ".join(Path(table).name for table in args.tables))
    print(f"\npicture in {out}")
    if args.check and leaks(rows)[0]:
        raise ValueError("splits leak into each other (--check), see above.")


def overlap(args: argparse.Namespace) -> None:
    """Print the sentences, n-grams, speakers and clips that test data share with training data, and with a lexicon."""
    from ..corpora.table import read_table
    from ..files import read_lines
    from ..overlap import NOTE, PROVENANCE, compare, describe_overlap, read_lexicon

    test = [row for row in read_table(args.test) if row.split != "train"]
    train = [row for table in args.train for row in read_table(table) if row.split == "train"]
    for rows, tables, splits in ((test, [args.test], "validation or test"), (train, args.train, "train")):
        if not rows:
            raise ValueError(f"{', '.join(tables)}: no row has the split {splits}, so there is nothing to compare.")
    if args.checkpoint:
        check_checkpoint_name(args.checkpoint)
    lexicon = read_lexicon(args.checkpoint) if args.checkpoint else None
    overlaps = compare(test, train, lexicon, read_lines(args.texts))
    notes = f"{NOTE}\n{PROVENANCE}" if lexicon else NOTE
    if args.json:
        known = {"train": args.train, "train_rows": len(train), "texts": args.texts, "checkpoint": args.checkpoint}
        print(
            json.dumps(
                known | {"overlaps": [dataclasses.asdict(found) for found in overlaps], "notes": notes.splitlines()}
            )
        )
        return
    nameless = sum(not row.speaker for row in train)
    print(f"training: {len(train):,} rows of {', '.join(args.train)}; {nameless:,} name no speaker")
    print(*(f"\n{describe_overlap(found)}" for found in overlaps), f"\n{notes}", sep="\n")


def show(args: argparse.Namespace) -> None:
    """Print conversations of a table as a model is trained on them, and the batch they make."""
    from transformers import AutoProcessor

    from ... import register_auto_classes
    from ..collator import DualSLMCollator
    from ..corpora.table import read_table
    from ..tasks import label_sets, make_sample, tasks_of

    register_auto_classes()
    table = read_table(args.table)
    able = ((row, tasks_of(row)) for row in table if row.split == args.split)
    fitting = ((row, tasks) for row, tasks in able if tasks and args.task in (None, *tasks))
    choices, samples = label_sets(table), []
    for number, (row, tasks) in enumerate(itertools.islice(fitting, args.count)):
        task = args.task or tasks[number % len(tasks)]
        samples.append(make_sample(row, task, choices, args.seed, args.epoch))
        _print_sample(samples[-1])
    if not samples:
        raise ValueError(f"{args.table} has no {args.split} row for {args.task or 'any task'}.")
    processor = AutoProcessor.from_pretrained(args.model or default_checkpoint())
    print("--- batch")
    for name, tensor in DualSLMCollator(processor)(samples).items():
        print(f"{name:>22}  {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


def _part_text(part: dict) -> str:
    if part.get("text") is not None:
        return part["text"]
    path = part.get("path", "no audio")
    return f"<speech: {path} | transcript: {part.get('transcript')} | caption: {part.get('caption')}>"


def _print_sample(sample: "Sample") -> None:
    print(f"--- {sample.id}, {sample.kind} task {sample.task}")
    for message in sample.messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"text": content}]:
            print(f"{message['role']:>10}  {_part_text(part)}")
    print(f"{'assistant':>10}  {sample.target}" + ("" if sample.complete else "  (cut: its end is not trained)"))
