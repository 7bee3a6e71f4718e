"""JSON objects written by a model."""

import json
from typing import Any, NoReturn

Fields = list[tuple[str, Any]]


class Object(list):  # type: ignore[type-arg]
    """The fields of one object in order, repeated names kept: a dict would hide that a name was written twice."""


def read_object(text: str) -> Fields | None:
    """The fields of the JSON object that `text` is, or None when it is anything else.

    The whole text counts, apart from white space around it: prose or a code fence around an object makes it useless
    to a program. NaN and Infinity, which Python would accept, are not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=Object, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, Object) else None


def is_json_object(text: str) -> bool:
    return read_object(text) is not None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
