"""`dual-slm align`."""

import argparse
import dataclasses

from .common import add_command, add_device_arguments, select


def register(subparsers) -> None:
    parser = add_command(subparsers, "align", align)
    parser.add_argument("table", help="Parquet file of `corpus read`")
    parser.add_argument("--out", required=True, metavar="TABLE", help="Parquet file")
    text = "the LLM: Hub id, folder or pip-hosted backbone"
    parser.add_argument("--model", default="smollm2-135m-instruct", help=text)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_device_arguments(parser)
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--limit", type=int, help="only the first rows, this many")
    parser.add_argument("--cut", action="store_true", help="add a row for each history, with a part of that history")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 (default) is none")
    parser.add_argument("--batch-size", type=int, default=16, help="rows answered at once")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    text = (
        "system prompt with {emotion} in it, which tells the LLM the emotion instead of a caption in the turn; for "
        "a small LLM, whose replies would talk about the caption"
    )
    parser.add_argument("--mood", metavar="SYSTEM", help=text)


def align(args: argparse.Namespace) -> None:
    """Let the frozen LLM answer the text twins of a table. Its replies are the targets of behaviour alignment."""
    from ..alignment import Aligner, AlignmentConfig, align_rows
    from ..corpora.checks import Report
    from ..corpora.table import read_table, write_table
    from ..files import Journal
    from ..tasks import cut_histories

    rows = [row for row in read_table(args.table) if args.split in (None, row.split)][: args.limit]
    if args.cut:
        rows = cut_histories(rows, args.seed)
    config = AlignmentConfig(**select(args, *(field.name for field in dataclasses.fields(AlignmentConfig))))
    aligner, report = Aligner(args.model, config, **select(args, "dtype", "device", "revision")), Report()
    count = write_table(align_rows(rows, aligner, Journal(f"{args.out}.replies.jsonl"), report), args.out)
    if report:
        print(report)
    if aligner.seconds:
        print(f"{aligner.tokens:,} tokens in {aligner.seconds:.0f} s, {aligner.tokens / aligner.seconds:.0f} tokens/s")
    print(f"{count:,} rows in {args.out}")
