"""Evaluates a checkpoint on a table, then computes a metric of one's own from the recorded replies.

python -m dual_slm.training.examples.own_metric CHECKPOINT TABLE FOLDER

The metric is the share of replies of at most three words, with a 95 % interval over speakers.
"""

import sys
from collections import defaultdict

import numpy as np

from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.metrics import bootstrap, ratio
from dual_slm.training.evaluation.records import read_records


def short_replies(records: list[dict]) -> tuple[float, tuple[float, float] | None]:
    """The share of short replies, and its interval (None with a single speaker)."""
    counts = defaultdict(lambda: np.zeros(2))  # speaker -> short replies, all replies
    for record in records:
        counts[record["speaker"]] += [len(record["reply"].split()) <= 3, 1]
    tallies = np.stack(list(counts.values()))
    return float(ratio(tallies.sum(0))), bootstrap(tallies, ratio)


def main(checkpoint: str, table: str, folder: str, **options) -> float:
    """Prints the metric of the table's test rows and returns it. `folder` gets the report, `options` are `evaluate`'s."""
    evaluate(checkpoint, [table], folder, suites=["attributes"], **options)
    share, interval = short_replies(read_records(folder))
    print(f"share of short replies: {share:.3f}, 95 % interval {interval}")
    return share


if __name__ == "__main__":
    main(*sys.argv[1:4])
