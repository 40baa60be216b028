"""Classifiers on frozen features: linear probes of encoder, statistics and branches, and a classifier of replies by style."""

from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch

from ...adapters_dual_slm import masked_statistics
from ..batches import batched
from ..corpora.row import Row
from ..labels import ATTRIBUTES
from ..text import hash_uniform
from .records import Record, record_of
from .suites import EQUAL, TAUGHT
from .systems import Checkpoint

FEW_SENTENCES = 20  # a corpus with at most so many sentences has the target "sentence"
FROZEN = ["encoder", "statistics"]  # sources of `vectors` that no training has changed
MOST_CLIPS = 10_000  # of a corpus that a probe is fitted to: the statistics of more would fill the memory


@torch.inference_mode()
def vectors(system: Checkpoint, rows: list[Row], source: str) -> np.ndarray:
    """Features (rows, width) of the clips.

    Args:
        source: "encoder" is the mean of its last layer. "statistics" is what an adapter with statistics reads; for other
            adapters it is mean and standard deviation of the layers that they read. "P branch" is the paralinguistic
            embeddings one after another, and "L branch" the mean of the linguistic embeddings.
    """
    if source == "encoder":
        states = (system.store.get(row) for row in rows)
        return np.stack([(s[-1] if s.ndim == 3 else s).mean(0).numpy() for s in states])
    if source == "statistics":
        if system.store.pools:
            return np.stack([system.store.get(row, "pooled").flatten().numpy() for row in rows])
        return np.stack([masked_statistics(*system.store.batch([row])).flatten().numpy() for row in rows])
    found = []
    for part in batched(rows, 64):
        if source == "P branch":
            features: Any = system.features(part, [])
            found.append(features.paralinguistic_embeds.float().flatten(1).cpu())
        else:
            features = system.features([], part)
            clips = features.linguistic_embeds.float().cpu().split(features.linguistic_lengths.tolist())
            found.append(torch.stack([c.mean(0) if len(c) else c.sum(0) for c in clips]))
    return torch.cat(found).numpy()


def targets(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """The (corpus, target) pairs that have at least two labels among the rows."""
    for corpus in sorted({row.corpus for row in rows}):
        own = [row for row in rows if row.corpus == corpus]
        for name in ATTRIBUTES:
            if len({row.label(name) for row in own} - {None}) > 1:
                yield corpus, name
        if 1 < len({row.transcript for row in own if row.transcript}) <= FEW_SENTENCES:
            yield corpus, "sentence"


def probe(system: Checkpoint, train: list[Row], test: list[Row], suite: str, sources: list[str]) -> Iterator[Record]:
    """Fits linear probes of features (see [`vectors`]) to `train` and yields records of their answers for `test`.

    Nothing is tuned: standardised features, at most 256 principal components, L2 with C = 1. For test rows at equal
    loudness the emotion is the only target. Of a larger corpus, `MOST_CLIPS` random training clips are used.
    """
    drawn = groupby(sorted(train, key=lambda r: (r.corpus, hash_uniform(r.id))), key=lambda r: r.corpus)
    kept = {row.key for _, own in drawn for row in islice(own, MOST_CLIPS)}
    train = [row for row in train if row.key in kept]
    rows = [*train, *test]
    for source in sources:
        features = vectors(system, rows, source)
        for corpus, target in targets(train):
            labels: list[Any] = [_label(row, target) if row.corpus == corpus else None for row in rows]
            fit = [n for n in range(len(train)) if labels[n]]
            choices = sorted({labels[n] for n in fit})
            ask = [n for n in range(len(train), len(rows)) if labels[n] in choices]
            ask = [n for n in ask if target == "emotion" or not rows[n].variant.loudness]
            if not ask:
                continue
            model = _classifier(features[fit], [labels[n] for n in fit])
            for n, answer in zip(ask, model.predict(features[ask]).tolist(), strict=True):
                task = target + (EQUAL if rows[n].variant.loudness else "")
                found = record_of(rows[n], suite, f"linear probe of the {source}", task, answer)
                yield found | {"label": labels[n], "parsed": answer, "choices": choices}


def _label(row: Row, target: str) -> str | None:
    return row.transcript if target == "sentence" else row.label(target)


def _classifier(features: np.ndarray, labels: list[str]):
    """A logistic regression, fitted."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = min(256, *features.shape)
    steps = [StandardScaler(), *([PCA(size, random_state=0)] if features.shape[1] > size else [])]
    return make_pipeline(*steps, LogisticRegression(max_iter=2000)).fit(features, labels)


def told_apart(records: list[Record], rows: dict[tuple[str, str], Row]) -> Iterator[Record]:
    """Records of a classifier that tells from a reply the emotion of the turn that it answers (suite `style`).

    The classifier is fitted to bags of words of the replies to training speakers' turns as text, then asked about all
    other replies. `rows` are the turns by (corpus, id).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    records = [r | {"label": rows[r["corpus"], r["id"]].emotion} for r in records]
    for corpus in sorted({r["corpus"] for r in records}):
        own = [r for r in records if r["corpus"] == corpus]
        taught = [r for r in own if r["condition"].endswith(TAUGHT)]
        asked = [r for r in own if not r["condition"].endswith(TAUGHT)]
        choices = sorted({r["label"] for r in taught})
        if len(choices) < 2 or not asked or not any(r["reply"].strip() for r in taught):
            continue
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        model = make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))
        model.fit([r["reply"] for r in taught], [r["label"] for r in taught])
        for r, answer in zip(asked, model.predict([r["reply"] for r in asked]).tolist(), strict=True):
            yield r | {"task": "emotion by the reply", "parsed": answer, "choices": choices}
