"""Scores of replies, and figures with intervals.

What is counted is an array for each speaker (`tally`): word errors and words, a confusion matrix, a sum and a number. Arrays
add up, and every figure is a function of their sum; so an interval draws speakers, not samples.
"""

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from ..tasks import Sample, parse_label, parse_transcript

Figure = Callable[[np.ndarray], np.ndarray]


# --------------------------------------------------------------------------------------------------------------------
# One reply
# --------------------------------------------------------------------------------------------------------------------


@cache
def _normalizer():
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalize(text: str) -> str:
    """Whisper's English normaliser: case, punctuation, numbers, contractions and spellings do not count as errors."""
    return _normalizer()(text)


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Substitutions + deletions + insertions, and the words that were said; both texts through `normalize`."""
    import jiwer

    said, heard = normalize(said), normalize(heard)
    if not said:
        return len(heard.split()), 0
    found = jiwer.process_words(said, heard)
    return found.substitutions + found.deletions + found.insertions, len(said.split())


def score(sample: Sample, reply: str, transcript: str | None = None) -> dict:
    """What a reply is worth: `said`, `heard`, `errors` and `words` of an ASR task, `label` and `parsed` (None: unparsed)
    of an attribute task, nothing for a dialogue.

    Args:
        transcript: the words that an ASR reply is held to.
    """
    if sample.task == "asr":
        heard = parse_transcript(reply)
        errors, words = word_errors(transcript, heard)
        return {"said": transcript, "heard": heard, "errors": errors, "words": words}
    if sample.choices:
        parsed = parse_label(reply, sample.choices, sample.task)
        return {"label": sample.label, "parsed": parsed, "choices": sorted(sample.choices)}
    return {}


# --------------------------------------------------------------------------------------------------------------------
# Figures: (..., tally) -> (...)
# --------------------------------------------------------------------------------------------------------------------


def ratio(tally: np.ndarray) -> np.ndarray:
    """(..., 2), a sum and a number: the mean. Word errors and words: the word error rate."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return tally[..., 0] / tally[..., 1]


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Weighted accuracy: the share of right replies. (..., C, C + 1), true label by parsed label, the last one unparsed."""
    with np.errstate(invalid="ignore"):
        return np.trace(confusion[..., :-1], axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def unweighted_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of the share of their samples that is right."""
    hits = np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1)
    return _mean_where(hits, confusion.sum(-1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur."""
    f1, counts = _f1(confusion)
    return _mean_where(f1 * counts, counts)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 weighted by how often each class occurs (MELD's usual figure)."""
    f1, counts = _f1(confusion)
    with np.errstate(invalid="ignore"):
        return (f1 * counts).sum(-1) / counts.sum(-1)


def unparsed(confusion: np.ndarray) -> np.ndarray:
    """Share of replies that name no label, or several."""
    with np.errstate(invalid="ignore"):
        return confusion[..., -1].sum(-1) / confusion.sum((-2, -1))


def majority(confusion: np.ndarray) -> np.ndarray:
    """Accuracy of always naming the most frequent label."""
    counts = confusion.sum(-1)
    return counts.max(-1) / counts.sum(-1)


def calibration_error(tally: np.ndarray) -> np.ndarray:
    """Expected calibration error. (..., bins, 3): samples, sum of confidences, number of right ones."""
    with np.errstate(invalid="ignore"):
        return np.abs(tally[..., 1] - tally[..., 2]).sum(-1) / tally[..., 0].sum(-1)


def _f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hits = np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1)
    counts, named = confusion.sum(-1), confusion[..., :-1].sum(-2)
    return 2 * hits / np.maximum(counts + named, 1), counts


def _mean_where(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    occurs = counts > 0
    with np.errstate(invalid="ignore"):
        return np.where(occurs, values / np.maximum(counts, 1), 0).sum(-1) / occurs.sum(-1)


LABEL_FIGURES: dict[str, Figure] = {
    "accuracy": accuracy,
    "unweighted accuracy": unweighted_accuracy,
    "macro F1": macro_f1,
    "unparsed": unparsed,
}


# --------------------------------------------------------------------------------------------------------------------
# Tallies and intervals
# --------------------------------------------------------------------------------------------------------------------


def confusion(pairs: Iterable[tuple[str, str | None]], labels: list[str]) -> np.ndarray:
    """(C, C + 1) counts of (true, parsed) labels; `None`, or a label that is none of them, is unparsed."""
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for true, parsed in pairs:
        matrix[labels.index(true), labels.index(parsed) if parsed in labels else -1] += 1
    return matrix


def calibration(pairs: Iterable[tuple[float, bool]], bins: int = 10) -> np.ndarray:
    """(bins, 3) of (confidence, right) pairs."""
    tally = np.zeros((bins, 3))
    for confidence, right in pairs:
        tally[min(int(confidence * bins), bins - 1)] += (1, confidence, right)
    return tally


def _draws(speakers: int, draws: int, seed: int) -> np.ndarray:
    """(draws, S): how often each speaker is in each draw."""
    return np.random.default_rng(seed).multinomial(speakers, np.full(speakers, 1 / speakers), size=draws)


def bootstrap(tallies: np.ndarray, figure: Figure, draws: int = 1000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a figure over resampled speakers: (S, ...) tallies. `None` for fewer than two speakers."""
    if len(tallies) < 2:
        return None
    values = figure(np.tensordot(_draws(len(tallies), draws, seed), tallies, axes=1))
    return tuple(float(v) for v in np.nanquantile(values, [0.025, 0.975]))


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, figure: Figure, draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of figure(second) - figure(first) over resampled speakers, the same ones for both: (S, ...) each."""
    if len(first) < 2:
        return None
    weights = _draws(len(first), draws, seed)
    values = figure(np.tensordot(weights, second, axes=1)) - figure(np.tensordot(weights, first, axes=1))
    return tuple(float(v) for v in np.nanquantile(values, [0.025, 0.975]))
