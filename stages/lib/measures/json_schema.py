"""JSON schema check: 1 when an answer has the reference's shape, 0 otherwise. Of values it sees the kind only."""

from collections.abc import Sequence
from typing import Any

from stages.lib.measures.json_text import Object, read_object

KINDS = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


def score(answer: str, reference: str) -> float:
    """Whether answer and reference are JSON objects of the same keys, each once, with values of the same kind.

    Kinds are object, array, string, number, boolean and null; inside objects and arrays the same is asked again. An
    array's items have kinds that the reference's items have, however many; an empty one matches an empty one only.

        reference {"x": 1, "names": ["a"]}     {"names": ["b", "c"], "x": 2}  1     {"x": "1", "names": ["a"]}  0
    """
    found, expected = read_object(answer), read_object(reference)
    return float(found is not None and expected is not None and _matches(Object(found), Object(expected)))


def _matches(found: Any, expected: Any) -> bool:
    if isinstance(found, Object) and isinstance(expected, Object):
        return _fields_match(found, expected)
    if isinstance(found, Object) or isinstance(expected, Object):
        return False
    if isinstance(found, list) and isinstance(expected, list):
        each_has_a_kind = all(any(_matches(item, known) for known in expected) for item in found)
        return bool(found) == bool(expected) and each_has_a_kind
    return KINDS.get(type(found), "array") == KINDS.get(type(expected), "array")


def _fields_match(found: Sequence[tuple[str, Any]], expected: Sequence[tuple[str, Any]]) -> bool:
    values = dict(expected)
    same_names = sorted(name for name, _ in found) == sorted(name for name, _ in expected)
    return same_names and all(_matches(value, values[name]) for name, value in found)
