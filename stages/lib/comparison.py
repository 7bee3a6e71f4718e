"""Arms compared on one set of rows: a figure per arm and measure, and how sure the differences are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stages.lib import bootstrap
from stages.lib.measures import SCORES
from stages.lib.schema.evaluate import Evaluate

PREDICTIONS = pa.schema(
    [
        ("arm", pa.string()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("slice", pa.string()),
        ("prompt_sha", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("n_tokens", pa.int32()),
        ("nll", pa.float64()),
        ("new_tokens", pa.int32()),
        ("stops", pa.float64()),
        *((name, pa.float64()) for name in SCORES),
    ]
)
"""One row per arm and test row, sorted by arm and id; a measure that does not apply to the task is null."""

BASELINES = ("base", "fewshot")
LOWER_IS_BETTER = ("loss", "perplexity")

Prediction = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One measure on one task: the figure of each arm, and tuned minus each baseline."""

    task: str
    measure: str
    arms: dict[str, float]
    against: dict[str, bootstrap.Difference]

    @property
    def higher_is_better(self) -> bool:
        return self.measure not in LOWER_IS_BETTER

    def verdict(self, baseline: str) -> str:
        return self.against[baseline].verdict(higher_is_better=self.higher_is_better)


def compare(predictions: Sequence[Prediction], p: Evaluate) -> list[Line]:
    """Every measure of every task, tasks in alphabetical order, measures in the order of the columns.

    Loss is nll per token over all tokens of the task; perplexity its exponential; the rest are means over rows.
    Args: predictions: rows as in PREDICTIONS, each id once per arm.
    """
    lines = []
    for task in sorted({row["task"] for row in predictions}):
        by_arm = {
            arm: sorted(
                (row for row in predictions if (row["task"], row["arm"]) == (task, arm)), key=lambda row: row["id"]
            )
            for arm in (*BASELINES, "tuned")
        }
        assert len({tuple(row["id"] for row in rows) for rows in by_arm.values()}) == 1
        n_tokens = [row["n_tokens"] for row in by_arm["tuned"]]
        per_token = {arm: [row["nll"] / row["n_tokens"] for row in rows] for arm, rows in by_arm.items()}
        lines.append(_line(task, "loss", per_token, n_tokens, p))
        lines.append(_line(task, "perplexity", per_token, n_tokens, p))
        for measure in (*SCORES, "stops"):
            if by_arm["tuned"][0][measure] is not None:
                scores = {arm: [row[measure] for row in rows] for arm, rows in by_arm.items()}
                lines.append(_line(task, measure, scores, [1] * len(n_tokens), p))
    return lines


def _line(task: str, measure: str, values: Mapping[str, Sequence[float]], weights: Sequence[int], p: Evaluate) -> Line:
    # The same seed for every measure: all see the same resampled rows.
    transform = np.exp if measure == "perplexity" else np.positive
    against = {
        arm: bootstrap.paired(
            values["tuned"],
            values[arm],
            weights,
            samples=p.bootstrap_samples,
            confidence=p.confidence,
            seed=p.seed,
            transform=transform,
        )
        for arm in BASELINES
    }
    return Line(
        task, measure, {arm: float(transform(bootstrap.mean(v, weights))) for arm, v in values.items()}, against
    )


def metrics(lines: Sequence[Line]) -> dict[str, float]:
    """Flat numbers `test/<task>/<measure>/<figure>`; delta, low, high are tuned minus base unless named otherwise."""
    found: dict[str, float] = {}
    for line in lines:
        key = f"test/{line.task}/{line.measure}"
        found |= {f"{key}/{arm}": value for arm, value in line.arms.items()}
        for baseline, difference in line.against.items():
            ending = "" if baseline == "base" else f"_{baseline}"
            found |= {
                f"{key}/delta{ending}": difference.delta,
                f"{key}/low{ending}": difference.low,
                f"{key}/high{ending}": difference.high,
            }
    return found


def main_measure(lines: Sequence[Line], task: str) -> Line:
    """The measure a task is judged by: field F1 where answers are JSON, else ROUGE-L."""
    of_task = {line.measure: line for line in lines if line.task == task}
    return of_task["field_f1"] if "field_f1" in of_task else of_task["rouge_l"]
