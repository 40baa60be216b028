"""A temperature for each attribute, so that a label named with 70 % is right about seven times in ten."""

import numpy as np
import torch

from ..attributes import Thresholds
from ..corpora.schema import read_table
from .metrics import calibration, calibration_error
from .suites import relabel
from .systems import Checkpoint

TEMPERATURES = np.exp(np.linspace(np.log(0.25), np.log(8.0), 301))
FEWEST = 30  # clips


def fit_temperature(log_probs: np.ndarray, targets: np.ndarray) -> float:
    """The temperature with the least cross entropy (Guo et al. 2017), of (clips, labels) log-probabilities and (clips,)
    right labels."""
    return float(min(TEMPERATURES, key=lambda temperature: _loss(log_probs / temperature, targets)))


def calibrate(system: Checkpoint, rows: list[dict]) -> dict[str, dict[str, float]]:
    """Fits the temperatures on `rows` (of validation speakers, never of the test) and sets them in the processor.

    Returns:
        Attribute -> clips, temperature, and before and after it the cross entropy (nats) and the calibration error (%) on
        the same clips. Attributes that fewer than 30 clips have are left out and keep no temperature.

    Raises:
        ValueError: no attribute has 30 clips.
    """
    processor, figures = system.processor, {}
    processor.attribute_temperatures = None
    system.prepare(rows)
    heard = [item["attributes"] or {} for item in system.hear(rows)]
    for name, labels in (processor.attribute_labels or {}).items():
        known = [(found[name], row[name]) for found, row in zip(heard, rows, strict=True) if row[name] in labels]
        if len(known) < FEWEST:
            continue
        log_probs = np.log(np.maximum([[found[label] for label in labels] for found, _ in known], 1e-12))
        targets = np.array([labels.index(label) for _, label in known])
        temperature = round(fit_temperature(log_probs, targets), 3)
        figures[name] = {"clips": len(known), "temperature": temperature}
        for when, scaled in (("before", log_probs), ("after", log_probs / temperature)):
            figures[name][f"cross entropy {when}"] = _loss(scaled, targets)
            figures[name][f"calibration error {when}"] = 100 * _error(scaled, targets)
    if not figures:
        raise ValueError(f"no attribute of the checkpoint has {FEWEST} clips with a label among the {len(rows)} rows.")
    processor.attribute_temperatures = {name: found["temperature"] for name, found in figures.items()}
    return figures


def calibration_rows(tables: list[str], thresholds: dict | None) -> list[dict]:
    """The clips of the validation speakers, labelled by the checkpoint's own thresholds.

    Raises:
        ValueError: the tables have none.
    """
    borders = Thresholds(**thresholds) if thresholds else None
    rows = [
        row for row in read_table(*tables) if row["split"] == "validation" and row["audio"] and not row["voice_only"]
    ]
    if not rows:
        raise ValueError(f"{', '.join(map(str, tables))}: no clip of the split 'validation'.")
    return [relabel(row, borders) for row in rows]


def _loss(log_probs: np.ndarray, targets: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(log_probs), torch.from_numpy(targets)))


def _error(log_probs: np.ndarray, targets: np.ndarray) -> float:
    probabilities = torch.from_numpy(log_probs).softmax(1).numpy()
    pairs = zip(probabilities.max(1).tolist(), (probabilities.argmax(1) == targets).tolist(), strict=True)
    return float(calibration_error(calibration(pairs)))
