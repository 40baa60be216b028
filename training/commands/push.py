"""`dual-slm push`."""

import argparse
import os
import sys
from pathlib import Path

from .common import add_command, load_checkpoint

# The card and the files it shows.
CARD_FILES = ["README.md", "evaluation.json", "training_log.json", "*.png", "examples/*"]


def register(subparsers) -> None:
    parser = add_command(subparsers, "push", push)
    parser.add_argument("folder", help="checkpoint folder")
    parser.add_argument("--repo", required=True, help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--tag", help="tag the pushed version")
    parser.add_argument("--message", default="Upload checkpoint", help="commit message")


def push(args: argparse.Namespace) -> None:
    """Load a checkpoint folder, then push its model, processor and card to the Hub."""
    from huggingface_hub import HfApi

    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json.")
    model, processor = load_checkpoint(str(folder))  # a checkpoint that does not load is not pushed
    for name in ("audio_model_id", "text_model_id"):
        place = getattr(model.config, name)
        if os.path.isdir(place):
            text = f"{name} is the folder {place}, which exists on this machine only. Whoever loads this checkpoint must pass"
            print(f"{text} from_pretrained(..., {name}=...).", file=sys.stderr)
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    model.push_to_hub(args.repo, commit_message=args.message)
    processor.push_to_hub(args.repo, commit_message=args.message)
    api.upload_folder(folder_path=folder, repo_id=args.repo, allow_patterns=CARD_FILES, commit_message=args.message)
    if args.tag:
        api.create_tag(args.repo, tag=args.tag)
    print(f"{api.endpoint}/{args.repo}")
