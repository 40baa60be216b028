"""Scores of replies that name a label, as a metric of `evaluate`. Unparsed replies are wrong and are counted."""

import datasets
import evaluate

from dual_slm.training.evaluation import metrics
from dual_slm.training.parsing import parse_label

_INPUTS = """
Args:
    predictions: list of replies ("The speaker sounds sad.").
    references: list of labels.
    labels: the choices; default: those of the references.
    task: gender, pitch, tempo, energy or emotion, so that labels of other attributes in a reply do not count.
Returns:
    accuracy (weighted accuracy, WA), unweighted_accuracy (UA), macro_f1, weighted_f1, unparsed.
"""


class LabelScores(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(__doc__ or "", citation="", features=features, inputs_description=_INPUTS)

    def _compute(
        self, predictions: list[str], references: list[str], labels: list[str] | None = None, task: str | None = None
    ) -> dict[str, float]:
        labels = sorted(labels or set(references))
        parsed = [parse_label(reply, labels, task) for reply in predictions]
        matrix = metrics.confusion(zip(references, parsed, strict=True), labels)
        figures = metrics.LABEL_FIGURES | {"weighted F1": metrics.weighted_f1}
        return {name.replace(" ", "_").lower(): float(figure(matrix)) for name, figure in figures.items()}
