"""The command line `dual-slm`."""

import argparse
import os
import sys

from .allocator import keep_memory
from .commands import align, backbones, benchmark, calibrate, corpus, evaluate, hear, port, push, reply, serve, train
from .commands.common import fit_dtype

COMMANDS = (backbones, reply, hear, serve, corpus, align, train, evaluate, calibrate, port, push, benchmark)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="dual-slm", description="Speech language models that hear how it is said.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 after an error (one line on stderr), or 130 after Ctrl-C.

    `DUAL_SLM_DEBUG` in the environment raises errors instead, and lets transformers log.
    """
    if not sys.stderr.isatty():  # progress bars fill log files: few updates are enough there
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    args = build_parser().parse_args(argv)
    if argv is None:
        keep_memory(args.command)
    debug = "DUAL_SLM_DEBUG" in os.environ
    if not debug:
        from transformers.utils import logging

        logging.set_verbosity_error()
        if getattr(args, "json", False) or not sys.stderr.isatty():
            logging.disable_progress_bar()
    try:
        fit_dtype(args)
        args.function(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"dual-slm {args.command}: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """The message of an error, without line breaks."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: pip install -e '.[train,eval,serve]' in a checkout of the repository"
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
