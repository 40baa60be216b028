"""`dual-slm evaluate`."""

import argparse
from pathlib import Path

from .common import add_command, add_device_arguments, select


def register(subparsers) -> None:
    parser = add_command(subparsers, "evaluate", evaluate)
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id, cascade:WHISPER+LLM, or a .jsonl of replies")
    parser.add_argument("--data", nargs="+", metavar="TABLE", help="tables of `dual-slm corpus`")
    text = "hearing, asr, attributes, meld, conversation, disentanglement, style, context, or all (default)"
    parser.add_argument("--suite", nargs="+", default=["all"], help=text)
    parser.add_argument("--out", metavar="DIR", help="report and samples; an interrupted evaluation continues there")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="of the tables")
    parser.add_argument("--limit", type=int, help="rows of each corpus and task, for asr of each subset")
    parser.add_argument("--seed", type=int, default=0, help="of row choice and pairings")
    text = "one or two: a causal LM, or http://host:port/v1#model"
    parser.add_argument("--judge", nargs="+", default=[], metavar="LLM", help=text)
    text = "of the judges' prompts: CS and EGS of the cited papers (default), CS-style-told and EGS-style-told of ours"
    parser.add_argument("--wording", nargs="+", default=["CS", "EGS"], help=text)
    text = "finished evaluations of other systems, whose replies to the same turns are judged too"
    parser.add_argument("--beside", nargs="+", default=[], metavar="DIR", help=text)
    parser.add_argument(
        "--benchmark", nargs="+", default=[], metavar="DIR", help="AIR-Bench (Foundation) or VoiceBench"
    )
    text = "parts of the names of a benchmark's tasks (default: emotion of AIR-Bench, all of VoiceBench)"
    parser.add_argument("--benchmark-task", nargs="+", default=[], metavar="NAME", help=text)
    text = "write what a system is asked, to answer it elsewhere, and stop; evaluate its replies as a .jsonl"
    parser.add_argument("--write-prompts", metavar="FILE.jsonl", help=text)
    parser.add_argument("--card", action="store_true", help="write the figures into the checkpoint's README.md")
    parser.add_argument("--compare", nargs=2, metavar="DIR", help="paired differences of two finished evaluations")
    parser.add_argument("--mean", nargs="+", metavar="DIR", help="mean and spread of finished evaluations (seeds)")
    add_device_arguments(parser, remote_code=True)


def evaluate(args: argparse.Namespace) -> None:
    """Ask a checkpoint (or Qwen2-Audio, a cascade, a file of replies) what it hears, score the answers, write a report."""
    from ..evaluation.benchmarks import index_files, read_benchmarks
    from ..evaluation.evaluate import evaluate as run_suites
    from ..evaluation.exchange import write_prompts
    from ..evaluation.report import averaged, compared, markdown, write_card

    if args.compare or args.mean:
        print(compared(*args.compare) if args.compare else averaged(args.mean))
        return
    prompts, data = args.write_prompts and Path(args.write_prompts), args.data or []
    if not (data or args.benchmark) or not (prompts or (args.checkpoint and args.out)):
        needed = "a checkpoint, --data TABLE (or --benchmark DIR) and --out DIR"
        raise ValueError(f"evaluate needs {needed}, or --write-prompts FILE and --data TABLE, or --compare DIR DIR.")
    scratch = prompts.with_suffix("") if prompts else Path(args.out) / "clips"
    questions = read_benchmarks(index_files(args.benchmark), scratch, args.benchmark_task) if args.benchmark else []
    if prompts:
        options = select(args, "split", "limit", "seed")
        notes = write_prompts(prompts, data, args.suite, questions=questions, **options)
        print("\n".join(notes))
        return
    if args.card and not Path(args.checkpoint).is_dir():
        raise ValueError(f"--card writes into a checkpoint's folder; {args.checkpoint} is none.")
    options = select(args, "split", "limit", "seed", "dtype", "device", "trust_remote_code")
    options |= {"suites": args.suite, "judges": args.judge, "wordings": args.wording, "beside": args.beside}
    result = run_suites(args.checkpoint, data, args.out, questions=questions, **options)
    print(markdown(result["figures"]))
    for note in result["notes"]:
        print(f"- {note}")
    for warning in result["warnings"]:
        print(f"! {warning}")
    if args.card:
        write_card(Path(args.checkpoint), result)
        print(f"figures written into {Path(args.checkpoint) / 'README.md'}")
    print(f"{Path(args.out) / 'report.html'} ({result['seconds']:.0f} s)")
