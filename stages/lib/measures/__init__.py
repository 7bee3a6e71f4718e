"""Measures of one answer against its reference, each in [0, 1], higher is better.

Every module holds a pure function `score(answer, reference)`. `library` makes them metrics of the `evaluate` library;
the modules live here because `evaluate.load` of a name fetches code from the network.
"""

from stages.lib.measures import chrf, exact_match, field_f1, json_valid, rouge_l
from stages.lib.measures.json_text import is_json_object

SCORES = {
    "exact_match": exact_match.score,
    "json_valid": json_valid.score,
    "field_f1": field_f1.score,
    "rouge_l": rouge_l.score,
    "chrf": chrf.score,
}
OF_JSON = ("json_valid", "field_f1")


def applicable(references: list[str]) -> list[str]:
    """Names of the measures that mean something for these references: those of JSON only if all are JSON objects."""
    is_json = all(is_json_object(reference) for reference in references)
    return [name for name in SCORES if is_json or name not in OF_JSON]
