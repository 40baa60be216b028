"""`dual-slm evaluate`."""

import argparse
from pathlib import Path

from .common import add_command, add_device_arguments, select


def register(subparsers) -> None:
    parser = add_command(subparsers, "evaluate", evaluate)
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id, or a .jsonl of replies")
    parser.add_argument("--data", nargs="+", metavar="TABLE", help="tables of `dual-slm corpus`")
    text = "hearing, asr, attributes, meld, conversation, disentanglement, style, context, or all (default)"
    parser.add_argument("--suite", nargs="+", default=["all"], help=text)
    parser.add_argument("--out", metavar="DIR", help="report and samples; an interrupted evaluation continues there")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="of the tables")
    parser.add_argument("--limit", type=int, help="rows of each corpus and task")
    parser.add_argument("--seed", type=int, default=0, help="of row choice and pairings")
    text = "one or two: a causal LM, or http://host:port/v1#model"
    parser.add_argument("--judge", nargs="+", default=[], metavar="LLM", help=text)
    parser.add_argument("--card", action="store_true", help="write the figures into the checkpoint's README.md")
    parser.add_argument("--compare", nargs=2, metavar="DIR", help="paired differences of two finished evaluations")
    parser.add_argument("--mean", nargs="+", metavar="DIR", help="mean and spread of finished evaluations (seeds)")
    add_device_arguments(parser, remote_code=True)


def evaluate(args: argparse.Namespace) -> None:
    """Ask a checkpoint (or Qwen2-Audio, or a file of replies) what it hears, score the answers, and write a report."""
    from ..evaluation.evaluate import evaluate as run_suites
    from ..evaluation.report import averaged, compared, markdown, write_card

    if args.compare or args.mean:
        print(compared(*args.compare) if args.compare else averaged(args.mean))
        return
    if not args.checkpoint or not args.data or not args.out:
        raise ValueError("evaluate needs a checkpoint, --data TABLE and --out DIR (or --compare DIR DIR).")
    if args.card and not Path(args.checkpoint).is_dir():
        raise ValueError(f"--card writes into a checkpoint's folder; {args.checkpoint} is none.")
    options = select(args, "split", "limit", "seed", "dtype", "device", "trust_remote_code")
    result = run_suites(args.checkpoint, args.data, args.out, suites=args.suite, judges=args.judge, **options)
    print(markdown(result["figures"]))
    for warning in result["warnings"]:
        print(f"! {warning}")
    if args.card:
        write_card(Path(args.checkpoint), result)
        print(f"figures written into {Path(args.checkpoint) / 'README.md'}")
    print(f"{Path(args.out) / 'report.html'} ({result['seconds']:.0f} s)")
