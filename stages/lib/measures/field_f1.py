"""Field F1: how many of a JSON object's fields are right, names and values together."""

import json
from collections import Counter
from typing import Any

from stages.lib.measures.json_text import Fields, read_object


def score(answer: str, reference: str) -> float:
    """F1 over (name, value) pairs.

    A pair is right when the reference holds the same name with the same value, both with runs of white space made one
    space; letter case counts, order does not. A name written twice counts twice in the answer, so it cannot gain. An
    answer that is no JSON object scores 0. An empty object scores 1 against an empty one.

        reference {"x": "int", "axis": "int, optional"}
        answer    {"x": "int", "axis": "int"}             1 of 2 right, 1 of 2 found  ->  0.5
    """
    found, expected = read_object(answer), read_object(reference)
    if found is None or expected is None:
        return 0.0
    if not found and not expected:
        return 1.0
    right = (_pairs(found) & _pairs(expected)).total()
    return 2 * right / (len(found) + len(expected))


def _pairs(fields: Fields) -> Counter[tuple[str, str]]:
    return Counter((_one_space(name), _text(value)) for name, value in fields)


def _text(value: Any) -> str:
    """A value as JSON text, so that the number 1 and the string "1" differ."""
    return json.dumps(_one_space(value) if isinstance(value, str) else value, ensure_ascii=False)


def _one_space(text: str) -> str:
    return " ".join(text.split())
