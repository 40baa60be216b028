"""Equivalence Replacement Regularization: where each branch of a spoken turn comes from (paper, section III-C).

One pure function of (kind of task, stage, seed, epoch, id); nothing else is drawn and nothing is remembered.
"""

import random
from typing import NamedTuple

STAGES = ("joint", "disentangle", "holistic")  # the paper's stages 1, 2 and 3
_TEXT = {"paralinguistic": "caption", "linguistic": "transcript"}


class Sources(NamedTuple):
    """Source of each branch of a turn, and whether its adapter learns from the sample."""

    paralinguistic: str  # speech | caption | none
    linguistic: str  # speech | transcript | none
    train_paralinguistic: bool
    train_linguistic: bool


def draw_sources(
    kind: str,
    stage: str,
    seed: int,
    epoch: int,
    sample_id: str,
    err: bool = True,
    replaced_share: float = 0.25,
    has_caption: bool = True,
    has_transcript: bool = True,
) -> Sources:
    """
    - `joint` (stage 1): both branches from speech, both adapters learn.
    - `disentangle` (stage 2): the branch that the task relies on comes from speech and its adapter learns; the other one
      comes from text, speech or none, one third each, and its adapter is frozen for this sample.
    - `holistic` (stage 3): dual tasks have both branches from speech, but in a `replaced_share` of the samples one of
      them, either one, comes from its text; both adapters learn. Linguistic and paralinguistic tasks are as in stage 2.

    Args:
        kind: linguistic, paralinguistic or dual.
        err: without it both branches always come from speech (ablation); stage 2 then freezes nothing.
        has_caption, has_transcript: whether the text of a branch is known; what is not known is not drawn.
    """
    if kind not in ("linguistic", "paralinguistic", "dual"):
        raise ValueError(f"kind is {kind!r}; it must be linguistic, paralinguistic or dual.")
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; it must be one of {', '.join(STAGES)}.")
    if stage == "joint" or not err:
        return Sources("speech", "speech", True, True)
    draw = random.Random(f"err/{seed}/{epoch}/{sample_id}/{kind}/{stage}")
    known = {"paralinguistic": has_caption, "linguistic": has_transcript}
    if kind == "dual":
        if stage == "disentangle" or draw.random() >= replaced_share:
            return Sources("speech", "speech", True, True)
        candidates = [branch for branch, text in known.items() if text]
        if not candidates:
            return Sources("speech", "speech", True, True)
        replaced = draw.choice(candidates)
        how = "caption" if replaced == "paralinguistic" else "speech"
        what = "transcript" if replaced == "linguistic" else "speech"
        return Sources(how, what, how == "speech", what == "speech")
    other = "paralinguistic" if kind == "linguistic" else "linguistic"
    choices = ([_TEXT[other]] if known[other] else []) + ["speech", "none"]
    source = draw.choice(choices)
    if kind == "linguistic":
        return Sources(source, "speech", False, True)
    return Sources("speech", source, True, False)
