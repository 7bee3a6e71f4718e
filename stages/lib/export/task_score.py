"""The task score of an exported model beside that of the trained one, on the same test rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.lib import bootstrap, comparison
from stages.lib.measures import SCORES, applicable


def differences(
    answers: Mapping[str, str],
    tuned: Sequence[Mapping[str, Any]],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, bootstrap.Difference]:
    """Exported minus trained model, by `task/measure`, with the paired bootstrap interval.

    The measure is accuracy of classifications, field F1 where answers are JSON objects, else ROUGE-L.

    Args: answers: row id -> answer of the exported model. tuned: rows of predictions.parquet, arm `tuned`, of which
        those with an answer are compared.
    """
    found = {}
    for task in sorted({row["task"] for row in tuned if row["id"] in answers}):
        rows = sorted((row for row in tuned if row["task"] == task and row["id"] in answers), key=lambda row: row["id"])
        references = [row["reference"] for row in rows]
        measure = comparison.main_of(applicable(references, of_labels=rows[0]["label"] is not None))
        score = SCORES[measure]
        found[f"{task}/{measure}"] = bootstrap.paired(
            bootstrap.mean,
            [[score(answers[row["id"]], row["reference"]) for row in rows]],
            [[score(row["answer"], row["reference"]) for row in rows]],
            samples=samples,
            confidence=confidence,
            seed=seed,
        )
    return found
