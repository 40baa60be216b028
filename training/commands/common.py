"""Arguments that several commands share, and how a command loads a checkpoint."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..labels import best_labels

if TYPE_CHECKING:
    from ...modeling_dual_slm import DualSLMForConditionalGeneration
    from ...processing_dual_slm import DualSLMProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CHECKPOINT = "dual-slm-smollm2-135m"


def add_command(subparsers, name: str, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """A parser whose description is the function's docstring, and whose short help is its first sentence."""
    text = " ".join((function.__doc__ or "").split())
    parser = subparsers.add_parser(name, help=re.split(r"(?<=\w)[.:](?: |$)", text)[0], description=text)
    parser.set_defaults(function=function)
    return parser


def add_device_arguments(parser: argparse.ArgumentParser, remote_code: bool = False) -> None:
    """`--dtype`, `--device` and, with `remote_code`, `--trust-remote-code`."""
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="number format of the backbones")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    if remote_code:
        text = "run the checkpoint's code instead of this package's"
        parser.add_argument("--trust-remote-code", action="store_true", help=text)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` reads: the checkpoint, its backbones, number format and device."""
    parser.add_argument("--model", help="checkpoint: a folder or Hub id (default: the released small one)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    for side in ("audio", "text"):
        other = "; another LLM is ported to, as by `dual-slm port`" if side == "text" else ""
        parser.add_argument(f"--{side}-model-id", help=f"another place that holds the same {side} backbone{other}")
    add_device_arguments(parser, remote_code=True)


def select(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def check_files(files: list[str]) -> None:
    """Refuses names that are neither files nor URLs."""
    for file in files:
        if not Path(file).is_file() and "://" not in file:
            raise FileNotFoundError(f"{file}: no such file.")


def show_heard(file: str, words: str | None, attributes: dict[str, dict[str, float]] | None) -> None:
    """Prints what was heard in a file, for people."""
    print(f"\nfile        {file}")
    if words is not None:
        print(f"heard       {words or '(nothing)'}")
    if attributes is not None:
        best = best_labels(attributes)
        print("attributes  " + ", ".join(f"{n} {v} ({attributes[n][v]:.0%})" for n, v in best.items()))


def default_checkpoint() -> str:
    """`model_cards/dual-slm-smollm2-135m` of this checkout, else of the working folder."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        folder = root / "model_cards" / DEFAULT_CHECKPOINT
        if (folder / "config.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"model_cards/{DEFAULT_CHECKPOINT} is not here: run in a checkout of the repository, or name a checkpoint by --model."
    )


def fit_dtype(args: argparse.Namespace) -> None:
    """Replaces a 16-bit `--dtype` by float32 on a CPU that is slow in it."""
    if getattr(args, "dtype", "auto") != "auto" and args.device == "cpu":
        from ..hardware import fast_dtype

        args.dtype = fast_dtype(args.dtype, sys.stderr)


def load(args: argparse.Namespace, **more: Any) -> "tuple[DualSLMForConditionalGeneration, DualSLMProcessor]":
    """Model and processor of the checkpoint that `add_checkpoint_arguments` names."""
    options = select(args, "dtype", "device", "revision", "trust_remote_code")
    given = {
        name: place for name, place in select(args, "audio_model_id", "text_model_id").items() if place is not None
    }
    return load_checkpoint(args.model or default_checkpoint(), **options, **given, **more)


def check_checkpoint_name(name: str) -> None:
    """Refuses what is neither a folder nor looks like a Hub id."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{name}: no such folder, and no Hub id (OWNER/NAME).")


def load_checkpoint(
    name: str, dtype="auto", device="cpu", revision: str | None = None, trust_remote_code=False, **more: Any
) -> "tuple[DualSLMForConditionalGeneration, DualSLMProcessor]":
    """Model and processor of the checkpoint `name`, a folder or a Hub id; `more` is for the model's `from_pretrained`.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: no such device.
    """
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from ... import register_auto_classes
    from ...backbones_dual_slm import name_in_errors

    register_auto_classes()
    check_checkpoint_name(name)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device; use --device cpu.")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with name_in_errors(name):
        processor = AutoProcessor.from_pretrained(name, text_model_id=more.get("text_model_id"), **options)
    options |= {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)} | more
    options["device_map"] = None if device == "cpu" else {"": device}
    return AutoModelForMultimodalLM.from_pretrained(name, **options), processor
