"""The measures as metrics of the `evaluate` library. Importing that takes seconds: import this where it is used."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from stages.lib.measures import SCORES


class RowMetric(evaluate.Metric):  # type: ignore[misc]  # the library is not typed
    """A measure of this package: its mean under its name, and the score of every row under <name>_rows."""

    def __init__(self, name: str) -> None:
        self.measure = name
        super().__init__(config_name=name, keep_in_memory=True, experiment_id=name)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=SCORES[self.measure].__module__,
            citation="",
            inputs_description="predictions: answers; references: what they should be",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        score = SCORES[self.measure]
        rows = [score(answer, reference) for answer, reference in zip(predictions, references, strict=True)]
        return {self.measure: sum(rows) / len(rows), f"{self.measure}_rows": rows}


def score_rows(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Scores of every row, by measure. Lists of the same length, at least one row."""
    together = evaluate.combine([RowMetric(name) for name in names])
    result = together.compute(predictions=list(answers), references=list(references))
    return {name: result[f"{name}_rows"] for name in names}
