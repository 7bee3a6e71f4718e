"""The record: one row of data as every stage after `prepare` sees it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
RECORD = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("group", pa.string()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("meta", pa.string()),
    ]
)
"""Columns of data/prepared and data/splits; meta is JSON text with sorted keys."""


def make(
    messages: Sequence[Mapping[str, str]], *, group: str, source: str, task: str, meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One record. Its id is the sha256 of task and messages: equal content, equal id, whatever the file."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return {
        "id": digest([task, turns]),
        "messages": turns,
        "group": group,
        "source": source,
        "task": task,
        "meta": json.dumps(meta or {}, sort_keys=True, ensure_ascii=False),
    }


def digest(value: Any) -> str:
    """sha256, in hex, of a value's canonical JSON text."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()
