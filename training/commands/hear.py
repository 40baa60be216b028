"""`dual-slm hear`."""

import argparse
import json

from .common import add_checkpoint_arguments, add_command, check_files, load, show_heard


def register(subparsers) -> None:
    parser = add_command(subparsers, "hear", hear)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files or URLs")
    add_checkpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a file")


def hear(args: argparse.Namespace) -> None:
    """Print the words and the voice attributes heard in each file, without a reply. The LLM's layers are not loaded."""
    check_files(args.files)
    from ..serving.ears import Ears

    model, processor = load(args, ears_only=True)
    if processor.caption_slots is None and processor.linguistic_adapter_type != "letters":
        raise ValueError("this checkpoint hears only by its LLM: use `dual-slm reply`.")
    ears = Ears(model, processor)
    for file in args.files:
        (heard,) = ears.hear([file])
        if args.json:
            print(json.dumps({"file": file} | heard.to_dict() | {"duration": round(heard.seconds, 3)}))
        else:
            show_heard(file, heard.words, heard.attributes)
