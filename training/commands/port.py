"""`dual-slm port`."""

import argparse
from pathlib import Path

from .common import add_command, add_device_arguments


def register(subparsers) -> None:
    parser = add_command(subparsers, "port", port)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint: a folder or Hub id")
    parser.add_argument("--to", required=True, metavar="LLM", help="Hub id, folder, or a name of `dual-slm backbones`")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    add_device_arguments(parser, remote_code=True)


def port(args: argparse.Namespace) -> None:
    """Move what a checkpoint hears to another LLM, without training: caption and words are spelled in its tokens.

    What is bound to the old LLM is dropped, and told."""
    from ...configuration_dual_slm import DualSLMConfig
    from .common import load_checkpoint, select

    if (args.out / "config.json").exists():
        raise FileExistsError(f"{args.out} holds a checkpoint already: name another folder by --out.")
    options = select(args, "dtype", "device", "revision", "trust_remote_code")
    model, processor = load_checkpoint(args.checkpoint, **options, text_model_id=args.to)
    config = model.config
    saved = DualSLMConfig.from_pretrained(args.checkpoint, revision=args.revision)
    if config.text_model_fingerprint == saved.text_model_fingerprint:
        raise ValueError(f"{args.checkpoint} cannot be ported to {args.to}: that is its LLM already.")
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out}  {config.text_model_id}, {config.num_paralinguistic_tokens} caption tokens")
