"""Fits a temperature for each attribute: of the labels that are named with 70 %, about seven in ten are right."""

from typing import Any

import numpy as np
import torch

from ..attributes import Thresholds, relabel
from ..corpora.row import Row
from ..corpora.table import read_table
from .metrics import calibration, calibration_error
from .systems import Checkpoint

TEMPERATURES = np.exp(np.linspace(np.log(0.25), np.log(8.0), 301))
FEWEST = 30  # clips


def fit_temperature(log_probs: np.ndarray, targets: np.ndarray) -> float:
    """The temperature with the lowest cross entropy (Guo et al. 2017).

    Args:
        log_probs: (clips, labels).
        targets: (clips,) indices of the right labels.
    """
    return float(min(TEMPERATURES, key=lambda temperature: _loss(log_probs / temperature, targets)))


def calibrate(system: Checkpoint, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Fits the temperatures and sets them in the processor.

    Args:
        rows: of validation speakers, never of the test.

    Returns:
        For each attribute `clips`, `temperature`, and the cross entropy (nats) and calibration error (%) before and
        after, on the same clips. Attributes with fewer than 30 clips are left out and keep no temperature.

    Raises:
        ValueError: no attribute has 30 clips.
    """
    processor, figures = system.processor, {}
    processor.attribute_temperatures = None
    system.prepare(rows)
    heard = [item["attributes"] or {} for item in system.hear(rows)]
    for name, labels in (processor.attribute_labels or {}).items():
        clips = zip(heard, rows, strict=True)
        known: list[Any] = [(found[name], row.label(name)) for found, row in clips if row.label(name) in labels]
        if len(known) < FEWEST:
            continue
        log_probs = np.log(np.maximum([[found[label] for label in labels] for found, _ in known], 1e-12))
        targets = np.array([labels.index(label) for _, label in known])
        temperature = round(fit_temperature(log_probs, targets), 3)
        figures[name] = {"clips": len(known), "temperature": temperature}
        for when, scaled in (("before", log_probs), ("after", log_probs / temperature)):
            figures[name][f"cross entropy {when}"] = _loss(scaled, targets)
            probabilities = torch.from_numpy(scaled).softmax(1).numpy()
            pairs = zip(probabilities.max(1), probabilities.argmax(1) == targets, strict=True)
            figures[name][f"calibration error {when}"] = 100 * float(calibration_error(calibration(pairs)))
    if not figures:
        raise ValueError(f"no attribute of the checkpoint has {FEWEST} clips with a label among the {len(rows)} rows.")
    processor.attribute_temperatures = {name: found["temperature"] for name, found in figures.items()}
    return figures


def _loss(log_probs: np.ndarray, targets: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(log_probs), torch.from_numpy(targets)))


def calibration_rows(tables: list[str], thresholds: dict | None) -> list[Row]:
    """The clips of the validation speakers, labelled by the checkpoint's own thresholds.

    Raises:
        ValueError: the tables have none.
    """
    borders = Thresholds(**thresholds) if thresholds else None
    rows = [row for row in read_table(*tables) if row.split == "validation" and row.audio and not row.voice_only]
    if not rows:
        raise ValueError(f"{', '.join(map(str, tables))}: no clip of the split 'validation'.")
    return [relabel(row, borders) for row in rows]
