"""JSON validity: 1 when the whole answer is one JSON object. It says nothing of what stands in it: field F1 does."""

from stages.lib.measures.json_text import is_json_object


def score(answer: str, reference: str) -> float:
    """The reference is not looked at; it is there for all measures to be called alike."""
    return float(is_json_object(answer))
