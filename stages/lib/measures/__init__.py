"""Measures of one answer against its reference, each in [0, 1], higher is better.

Every module holds a pure function `score(answer, reference)`; `classification` and `likelihood` hold figures of many
rows. `library` makes the first metrics of the `evaluate` library; they live here because `evaluate.load` of a name
fetches code from the network.

No measure that judges a task rewards an answer which ignores the question: over references that differ, an empty, a
constant or a copied answer scores below the right ones. JSON validity alone does not judge: a constant `{}` is valid.
"""

from collections.abc import Sequence

from stages.lib.measures import (
    accuracy,
    bleu,
    chrf,
    exact_match,
    field_f1,
    json_schema,
    json_valid,
    rouge_l,
    token_f1,
)
from stages.lib.measures.json_text import is_json_object

SCORES = {
    "exact_match": exact_match.score,
    "json_valid": json_valid.score,
    "json_schema": json_schema.score,
    "field_f1": field_f1.score,
    "token_f1": token_f1.score,
    "rouge_l": rouge_l.score,
    "bleu": bleu.score,
    "chrf": chrf.score,
    "accuracy": accuracy.score,
}
OF_JSON = ("json_valid", "json_schema", "field_f1")


def applicable(references: Sequence[str], *, of_labels: bool = False) -> list[str]:
    """Names of the measures that mean something for these references.

    Those of JSON only if all are JSON objects. Of labels, exact match and accuracy only: a label that shares words
    with the right one is no better than another.
    """
    if of_labels:
        return ["exact_match", "accuracy"]
    is_json = all(is_json_object(reference) for reference in references)
    return [name for name in SCORES if name != "accuracy" and (is_json or name not in OF_JSON)]
