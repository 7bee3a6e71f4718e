"""The record: one row of data as every stage after `prepare` sees it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib import files

TURN = pa.struct(
    [(name, pa.string()) for name in ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")]
)
RECORD = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("messages", pa.list_(TURN)),
        ("tools", pa.string()),
        ("text", pa.string()),
        ("chosen", pa.list_(TURN)),
        ("rejected", pa.list_(TURN)),
        ("label", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("meta", pa.string()),
    ]
)
"""Columns of data/prepared and data/splits.

    kind         messages                    besides
    chat         ... ends with an answer     tools; label, when the answer is a class
    text         null                        text: all of it is learned
    preference   the prompt                  chosen, rejected: the turns that may follow
    unpaired     ... ends with an answer     label: "true" (wanted) or "false"

A turn has role and content; an assistant's may have tool_calls, a tool's tool_call_id and name. tools, tool_calls and
meta are JSON text. split is the official one, where the data name it; group "" stands for a row of its own.
"""

JSON_KEYS = ("tool_calls",)
CONTENT = ("messages", "tools", "text", "chosen", "rejected", "label")


def make(
    messages: Sequence[Mapping[str, Any]] | None = None,
    *,
    group: str,
    source: str,
    task: str,
    kind: str = "chat",
    tools: Any = None,
    text: str | None = None,
    chosen: Sequence[Mapping[str, Any]] | None = None,
    rejected: Sequence[Mapping[str, Any]] | None = None,
    label: str | None = None,
    split: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One record. Its id is the sha256 of task and content: equal content, equal id, whatever the file."""
    found: dict[str, Any] = {
        "messages": messages,
        "tools": tools,
        "text": text,
        "chosen": chosen,
        "rejected": rejected,
        "label": label,
    }
    content = {key: value for key, value in found.items() if value is not None}
    is_plain = kind == "chat" and set(content) == {"messages"}
    return {
        "id": digest([task, messages] if is_plain else [task, kind, content]),
        "kind": kind,
        **found,
        "split": split,
        "group": group,
        "source": source,
        "task": task,
        "meta": dict(meta or {}),
    }


def digest(value: Any) -> str:
    """sha256, in hex, of a value's canonical JSON text."""
    return hashlib.sha256(_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Records as the table that is written."""
    return pa.Table.from_pylist([_encoded(row) for row in rows], schema=RECORD)


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Write records as one Parquet file, in the order given."""
    files.write_table(path, table(found))


def rows(found: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The records of a table, as `make` made them: turns without empty keys, tools and tool_calls as values."""
    return [_decoded(row) for row in found.to_pylist()]


def batches(path: Path, size: int = 10_000) -> Iterator[pa.RecordBatch]:
    """The records of a Parquet file, or of a folder of shards in the order of their names, in bounded memory.

    `rows` takes a batch. Batches end at the boundaries of row groups too, so they may be smaller than `size`.
    """
    for shard in shards(path):
        with pq.ParquetFile(shard) as file:
            yield from file.iter_batches(batch_size=size)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a Parquet file or of a folder of shards, in memory at once."""
    return [row for batch in batches(path) for row in rows(batch)]


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of which the last is an answer to learn: a preference's are its prompt and chosen; a text has none."""
    if row["messages"] is None:
        return None
    return [*row["messages"], *(row["chosen"] or [])]


def _encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = {
        key: None if row[key] is None else [_turn(turn, _json) for turn in row[key]]
        for key in ("messages", "chosen", "rejected")
    }
    tools = None if row["tools"] is None else _json(row["tools"])
    return {**row, **turns, "tools": tools, "meta": _json(row["meta"])}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    for key in ("messages", "chosen", "rejected"):
        if row[key] is not None:
            row[key] = [_turn(turn, json.loads) for turn in row[key]]
    row["tools"] = None if row["tools"] is None else json.loads(row["tools"])
    row["meta"] = json.loads(row["meta"])
    return row


def _turn(turn: Mapping[str, Any], translate: Any) -> dict[str, Any]:
    """A turn without its empty keys; an assistant that only calls tools keeps its content of None away."""
    return {key: translate(value) if key in JSON_KEYS else value for key, value in turn.items() if value is not None}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
