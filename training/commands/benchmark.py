"""`dual-slm benchmark`."""

import argparse
import json

from .common import add_checkpoint_arguments, add_command, load


def register(subparsers) -> None:
    parser = add_command(subparsers, "benchmark", benchmark)
    parser.add_argument("what", choices=["reply", "train"], help="a spoken reply, or a training step")
    add_checkpoint_arguments(parser)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the spoken turn")
    parser.add_argument("--repeats", type=int, default=7, help="measured turns, after one warm-up")
    parser.add_argument("--batch-size", type=int, default=16, help="of a training step")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of each reply")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def benchmark(args: argparse.Namespace) -> None:
    """Measure the cost: `reply` times a spoken turn to its first token, `train` times a training step."""
    from ..benchmark import benchmark_reply, benchmark_train, show

    model, processor = load(args)
    if args.what == "reply":
        result = benchmark_reply(model, processor, args.seconds, args.repeats, args.max_new_tokens)
    else:
        result = benchmark_train(model, processor, batch_size=args.batch_size)
    if args.json:
        print(json.dumps(result))
    elif args.what == "reply":
        print(show(result))
    else:
        for name, value in result.items():
            print(f"{name:36} {value:,.2f}" if isinstance(value, float) else f"{name:36} {value:,}")
