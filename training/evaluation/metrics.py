"""Metrics with confidence intervals.

Each speaker has a tally: an array of counts such as word errors and words, or a confusion matrix. A metric is a function of
the sum of tallies, so that the bootstrap draws speakers instead of samples. It is our own because scipy's resamples single
values, and a draw here costs one sum.
"""

from collections.abc import Callable, Iterable

import numpy as np

Figure = Callable[[np.ndarray], np.ndarray]  # (..., tally) -> (...)


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / count


def ratio(tally: np.ndarray) -> np.ndarray:
    """A mean from (..., 2): a sum and a count. For word errors and words: the word error rate."""
    return _divide(tally[..., 0], tally[..., 1])


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Weighted accuracy: the share of right replies.

    Args:
        confusion: (..., C, C + 1), true label by parsed label; the last column is "unparsed". Other metrics take the same.
    """
    return _divide(np.trace(confusion[..., :-1], axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def unweighted_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Recall, averaged over the classes that occur."""
    return _class_mean(np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1), confusion.sum(-1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """F1, averaged over the classes that occur."""
    return _class_mean(_weighted(confusion), confusion.sum(-1))


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """F1, averaged with the number of samples of each class as its weight (usual for MELD)."""
    return _divide(_weighted(confusion).sum(-1), confusion.sum((-2, -1)))


def unparsed(confusion: np.ndarray) -> np.ndarray:
    """Share of replies that name no label or several."""
    return _divide(confusion[..., -1].sum(-1), confusion.sum((-2, -1)))


def majority(confusion: np.ndarray) -> np.ndarray:
    """Accuracy of a system that always names the most frequent label."""
    return confusion.sum(-1).max(-1) / confusion.sum((-2, -1))


def calibration_error(tally: np.ndarray) -> np.ndarray:
    """Expected calibration error from (..., bins, 3): samples, sum of confidences, number of right answers."""
    return _divide(np.abs(tally[..., 1] - tally[..., 2]).sum(-1), tally[..., 0].sum(-1))


def _weighted(confusion: np.ndarray) -> np.ndarray:
    """F1 of each class times its number of samples."""
    hits = np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1)
    counts, named = confusion.sum(-1), confusion[..., :-1].sum(-2)
    return 2 * hits / np.maximum(counts + named, 1) * counts


def _class_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values / counts over the classes that occur; the values are 0 for the others."""
    return _divide((values / np.maximum(counts, 1)).sum(-1), (counts > 0).sum(-1))


LABEL_FIGURES: dict[str, Figure] = {
    "accuracy": accuracy,
    "unweighted accuracy": unweighted_accuracy,
    "macro F1": macro_f1,
    "unparsed": unparsed,
}


def confusion(pairs: Iterable[tuple[str, str | None]], labels: list[str]) -> np.ndarray:
    """(C, C + 1) counts of (true, parsed) labels. `None` and labels outside `labels` are unparsed."""
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for true, parsed in pairs:
        matrix[labels.index(true), labels.index(parsed) if parsed in labels else -1] += 1
    return matrix


def calibration(pairs: Iterable[tuple[float, bool]], bins: int = 10) -> np.ndarray:
    """(bins, 3) tally of (confidence, right) pairs."""
    tally = np.zeros((bins, 3))
    for confidence, right in pairs:
        tally[min(int(confidence * bins), bins - 1)] += (1, confidence, right)
    return tally


def bootstrap(
    tallies: np.ndarray, figure: Figure, draws: int = 1000, seed: int = 0, baseline: np.ndarray | None = None
) -> tuple[float, float] | None:
    """95 % interval of a metric over resampled speakers; `None` for fewer than two.

    Args:
        tallies: (S, ...), one for each speaker.
        baseline: other tallies of the same speakers. The interval is then that of the difference to their metric.
    """
    speakers = len(tallies)
    if speakers < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(speakers, np.full(speakers, 1 / speakers), size=draws)
    values = figure(np.tensordot(weights, tallies, axes=1))
    if baseline is not None:
        values = values - figure(np.tensordot(weights, baseline, axes=1))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
