"""Classifiers: what tells the replies to two styles apart; and linear probes, what a logistic regression reads from the
encoder, and from each branch, on speakers it never saw."""

from collections.abc import Iterator

import numpy as np
import torch

from ..tasks import ATTRIBUTES
from .suites import EQUAL, TAUGHT
from .systems import Checkpoint

FEW_SENTENCES = 20  # a corpus with so few has "which sentence" as a target: what is said, as a class
SOURCES = ("encoder", "P branch", "L branch")


def vectors(system: Checkpoint, rows: list[dict], source: str, batch_size: int = 64) -> np.ndarray:
    """(rows, width): mean of the encoder's last layer, the paralinguistic embeddings in a row, or the mean of the
    linguistic ones."""
    if source == "encoder":
        states = [system.store.get(row) for row in rows]
        return np.stack([(s[-1] if s.ndim == 3 else s).mean(0).numpy() for s in states])
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            if source == "P branch":
                embeds = system.features(part, []).paralinguistic_embeds
                found.append(embeds.float().flatten(1).cpu())
            else:
                features = system.features([], part)
                clips = features.linguistic_embeds.float().cpu().split(features.linguistic_lengths.tolist())
                width = features.linguistic_embeds.shape[-1]
                found.append(torch.stack([c.mean(0) if len(c) else torch.zeros(width) for c in clips]))
    return torch.cat(found).numpy()


def targets(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """(corpus, target) pairs that rows have at least two labels of."""
    for corpus in sorted({row["corpus"] for row in rows}):
        of = [row for row in rows if row["corpus"] == corpus]
        for name in ATTRIBUTES:
            if len({row[name] for row in of if row[name]}) > 1:
                yield corpus, name
        if 1 < len({row["transcript"] for row in of if row["transcript"]}) <= FEW_SENTENCES:
            yield corpus, "sentence"


def probe(system: Checkpoint, train: list[dict], test: list[dict], suite: str, sources=SOURCES) -> Iterator[dict]:
    """Records of probes that are trained on `train` and asked on `test`, nothing tuned: standardised features, at most 256
    principal components, L2 with C = 1. Of a test row brought to equal loudness they are asked the emotion alone."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for source in sources:
        rows = [*train, *test]
        known = {id(row): vector for row, vector in zip(rows, vectors(system, rows, source), strict=True)}
        for corpus, target in targets(train):
            column = "transcript" if target == "sentence" else target
            fit, ask = ([r for r in side if r["corpus"] == corpus and r[column]] for side in (train, test))
            choices = sorted({row[column] for row in fit})
            ask = [row for row in ask if row[column] in choices and (target == "emotion" or not row.get("loudness"))]
            if not ask:
                continue
            features = np.stack([known[id(row)] for row in fit])
            size = min(256, *features.shape)
            steps = [StandardScaler(), *([PCA(size, random_state=0)] if features.shape[1] > size else [])]
            model = make_pipeline(*steps, LogisticRegression(max_iter=2000))
            model.fit(features, [row[column] for row in fit])
            answers = model.predict(np.stack([known[id(row)] for row in ask]))
            for row, answer in zip(ask, answers, strict=True):
                record = {"suite": suite, "condition": f"linear probe of the {source}"}
                record |= {"task": target + (EQUAL if row.get("loudness") else "")}
                record |= {"corpus": corpus, "id": row["id"], "speaker": row["speaker"] or row["id"]}
                record |= {"gender": row["gender"], "audio": row["audio"], "reply": str(answer)}
                yield record | {"label": row[column], "parsed": str(answer), "choices": choices}


def told_apart(records: list[dict], rows: dict[tuple[str, str], dict]) -> Iterator[dict]:
    """Records of a classifier of the suite `style`: bags of words of the replies to training speakers' text twins teach it
    the emotion of the turn that was answered; it is asked of every other reply.

    Args:
        records: of the suite.
        rows: (corpus, id) -> row.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def emotions(part: list[dict]) -> list[str]:
        return [rows[r["corpus"], r["id"]]["emotion"] for r in part]

    for corpus in sorted({r["corpus"] for r in records}):
        own = [r for r in records if r["corpus"] == corpus]
        taught = [r for r in own if r["condition"].endswith(TAUGHT)]
        asked = [r for r in own if not r["condition"].endswith(TAUGHT)]
        choices = sorted(set(emotions(taught)))
        if len(choices) < 2 or not asked:
            continue
        if not any(r["reply"].strip() for r in taught):
            continue
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        model = make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))
        model.fit([r["reply"] for r in taught], emotions(taught))
        answers = model.predict([r["reply"] for r in asked])
        for r, label, answer in zip(asked, emotions(asked), answers, strict=True):
            yield r | {"task": "emotion by the reply", "label": label, "parsed": str(answer), "choices": choices}
