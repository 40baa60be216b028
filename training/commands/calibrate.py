"""`dual-slm calibrate`."""

import argparse
import json
import tempfile
from pathlib import Path

from .common import add_command, add_device_arguments


def register(subparsers) -> None:
    parser = add_command(subparsers, "calibrate", calibrate)
    parser.add_argument("checkpoint", help="folder; its processor_config.json is rewritten")
    parser.add_argument("--data", nargs="+", metavar="TABLE", required=True, help="tables of `dual-slm corpus`")
    parser.add_argument("--features", metavar="DIR", help="keep the features here (default: nowhere)")
    add_device_arguments(parser)


def calibrate(args: argparse.Namespace) -> None:
    """Fit a temperature for each attribute on validation speakers. It makes the probabilities match how often they are
    right."""
    from ..evaluation.calibrate import calibrate as fit
    from ..evaluation.calibrate import calibration_rows
    from ..evaluation.systems import Checkpoint, load_system
    from ..files import read_json, write_text

    path = Path(args.checkpoint) / "processor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint's folder is calibrated in place.")
    with tempfile.TemporaryDirectory() as folder:
        system = load_system(args.checkpoint, args.features or folder, dtype=args.dtype, device=args.device)
        if not isinstance(system, Checkpoint):
            raise ValueError(f"{args.checkpoint} is no checkpoint of this package.")
        rows = calibration_rows(args.data, system.model.config.attribute_thresholds)
        for name, found in fit(system, rows).items():
            print(name + "  " + ", ".join(f"{k} {v:.2f}" if k != "clips" else f"{v} clips" for k, v in found.items()))
    values = read_json(path) | {"attribute_temperatures": system.processor.attribute_temperatures}
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")  # as save_pretrained writes it
