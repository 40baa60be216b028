"""Draws the source of each branch of a spoken turn: Equivalence Replacement Regularization (ERR; paper, section III-C).

A draw is a pure function of the rules, the seed, the epoch, the row and the kind of task.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

from .corpora.row import Row

STAGES = ("joint", "disentangle", "holistic")  # the paper's stages 1, 2 and 3
_TEXT = {"paralinguistic": "caption", "linguistic": "transcript"}


class Sources(NamedTuple):
    """The source of each branch of a turn, and whether its adapter learns from the sample."""

    paralinguistic: str  # speech | caption | none
    linguistic: str  # speech | transcript | none
    train_paralinguistic: bool
    train_linguistic: bool


_BOTH = Sources("speech", "speech", True, True)


@dataclass(frozen=True)
class SourceRules:
    """The rules by which a stage of training draws sources."""

    err_stage: str = "joint"  # one of STAGES; see `draw_sources`
    err: bool = True  # False: both branches come from speech, and both adapters learn (ablation)
    replaced_share: float = 0.25  # of the dual samples of a holistic stage: text replaces one branch
    paralinguistic_source: str = "speech"  # speech, or none (ablation: words alone)
    linguistic_source: str = "speech"  # speech, transcript (EmoSLLM) or none (ablation: voice alone)

    def __post_init__(self):
        if self.err_stage not in STAGES:
            raise ValueError(f"err_stage is {self.err_stage!r}; it must be one of {', '.join(STAGES)}.")


def draw_sources(
    rules: SourceRules,
    row: Row,
    kind: str,
    seed: int,
    epoch: int,
    has_caption: bool = True,
    has_transcript: bool = True,
) -> Sources:
    """Draws the sources of a training sample of a linguistic, paralinguistic or dual task. Unknown text is never drawn.

    - `joint` (stage 1): both branches come from speech, and both adapters learn.
    - `disentangle` (stage 2): the branch that the task relies on comes from speech, and its adapter learns. The other
      branch comes from text, speech or none, one third each; its adapter is frozen for this sample.
    - `holistic` (stage 3): in a dual task both branches come from speech. In a `replaced_share` of the samples, text
      replaces one of them, which then teaches its adapter nothing. The other tasks are as in stage 2.

    The stage's own sources come last: they replace speech by text or by nothing. A `voice_only` row always has its voice
    from speech and its words as text.
    """
    key = f"err/{seed}/{epoch}/{row.id}/{row.variant.copy}/{kind}/{rules.err_stage}"
    known = {"paralinguistic": has_caption, "linguistic": has_transcript}
    return _stage_sources(_err_sources(rules, kind, known, random.Random(key)), rules, row)


def heard_sources(rules: SourceRules, row: Row, drawn: Sources = _BOTH) -> Sources:
    """The sources of a validation sample: both branches from speech, and adapters learn as `drawn`; then the stage's own."""
    return _stage_sources(drawn._replace(paralinguistic="speech", linguistic="speech"), rules, row)


def _err_sources(rules: SourceRules, kind: str, known: dict[str, bool], draw: random.Random) -> Sources:
    if rules.err_stage == "joint" or not rules.err:
        return _BOTH
    if kind == "dual":
        candidates = [branch for branch, text in known.items() if text]
        if rules.err_stage == "disentangle" or draw.random() >= rules.replaced_share or not candidates:
            return _BOTH
        other = draw.choice(candidates)
        source = _TEXT[other]
    else:
        other = "paralinguistic" if kind == "linguistic" else "linguistic"
        source = draw.choice([_TEXT[other], "speech", "none"] if known[other] else ["speech", "none"])
    if other == "paralinguistic":
        return Sources(source, "speech", False, True)
    return Sources("speech", source, True, False)


def _stage_sources(sources: Sources, rules: SourceRules, row: Row) -> Sources:
    if row.voice_only:
        sources = Sources("speech", "transcript", True, False)
    if rules.paralinguistic_source == "none":
        sources = sources._replace(paralinguistic="none", train_paralinguistic=False)
    if rules.linguistic_source != "speech":
        sources = sources._replace(train_linguistic=False)
        if rules.linguistic_source == "none" or not row.transcript:
            sources = sources._replace(linguistic="none")
        elif sources.linguistic == "speech":
            sources = sources._replace(linguistic="transcript")
    return sources
