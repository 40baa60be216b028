"""Word error rate over all references, both texts normalised by Whisper's English normaliser, as a metric of `evaluate`."""

import datasets
import evaluate

from dual_slm.training.parsing import word_errors

_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts.
Returns:
    wer: errors over words; errors, words: what it is made of.
"""


class AsrWer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(__doc__ or "", citation="", features=features, inputs_description=_INPUTS)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        counts = [word_errors(said, heard) for said, heard in zip(references, predictions, strict=True)]
        errors, words = sum(e for e, _ in counts), sum(w for _, w in counts)
        return {"wer": errors / words if words else float("nan"), "errors": errors, "words": words}
