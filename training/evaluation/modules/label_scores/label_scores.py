"""Weighted and unweighted accuracy, F1 and the share of unparsed replies, as a metric of `evaluate`."""

import datasets
import evaluate

from dual_slm.training.evaluation import metrics
from dual_slm.training.tasks import parse_label

_DESCRIPTION = "Scores of replies that name a label: parsed strictly, what cannot be parsed is wrong and counted."
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
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(texts)
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        labels: list[str] | None = None,
        task: str | None = None,
    ) -> dict[str, float]:
        labels = sorted(labels or set(references))
        parsed = [parse_label(reply, labels, task) for reply in predictions]
        matrix = metrics.confusion(zip(references, parsed, strict=True), labels)
        figures = metrics.LABEL_FIGURES | {"weighted F1": metrics.weighted_f1}
        return {name.replace(" ", "_").lower(): float(figure(matrix)) for name, figure in figures.items()}
