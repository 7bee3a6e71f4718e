"""The record: one row of data as every stage after `prepare` sees it."""

import hashlib
import itertools
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
meta are JSON text; a call is {"type": "function", "function": {"name", "arguments": {...}}, perhaps "id"}, a tool is
{"type": "function", "function": {"name", ...}}. An assistant that only calls tools has no content. split is the
official one, where the data name it; group "" stands for a row of its own. source is the file, or the name in
data.sources where there are several.
"""

TURNS = ("messages", "chosen", "rejected")
ROWS_PER_GROUP = 10_000
ROWS_PER_SHARD = 50_000  # a multiple of the rows in a group
JSON_KEYS = ("tool_calls",)
SYNTHETIC = "synthetic"  # the source of rows that a model wrote; they keep it wherever they lie
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
    encode = {**dict.fromkeys(TURNS, _turn_lists), "tools": _json_texts, "meta": _json_texts}
    columns = [encode.get(name, _texts)([row[name] for row in rows]) for name in RECORD.names]
    return pa.Table.from_arrays(columns, schema=RECORD)


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Write records as one Parquet file, in the order given."""
    files.write_table(path, table(found))


def rows(found: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The records of a table, as `make` made them: turns without empty keys, tools and tool_calls as values."""
    if isinstance(found, pa.Table):
        return [row for batch in found.to_batches() for row in rows(batch)]
    decode: dict[str, Any] = {**dict.fromkeys(TURNS, _lists_of_turns), "tools": _values, "meta": _values}
    names = found.schema.names
    columns = [decode.get(name, pa.Array.to_pylist)(found.column(name)) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


class Shards:
    """Records written to a folder as they come: rows-00000.parquet, ..., all but the last of ROWS_PER_SHARD rows.

    The bytes depend on the rows alone, not on how they were cut into tables. Held in memory: ROWS_PER_GROUP rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: list[pa.Table] = []
        self.count = 0
        self.writer: pq.ParquetWriter | None = None
        self.written = 0

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *fault: object) -> None:
        if self.count and fault == (None, None, None):
            self._write_group(pa.concat_tables(self.held))
        self._close()

    def write(self, rows: pa.Table) -> None:
        self.held.append(rows)
        self.count += rows.num_rows
        if self.count >= ROWS_PER_GROUP:
            held = pa.concat_tables(self.held)
            while held.num_rows >= ROWS_PER_GROUP:
                self._write_group(held.slice(0, ROWS_PER_GROUP))
                held = held.slice(ROWS_PER_GROUP)
            self.held, self.count = [held], held.num_rows

    def _write_group(self, rows: pa.Table) -> None:
        if self.writer is None:
            path = self.folder / f"rows-{self.written // ROWS_PER_SHARD:05d}.parquet"
            self.writer = pq.ParquetWriter(path, RECORD, compression="zstd")
        self.writer.write_table(rows.combine_chunks(), row_group_size=rows.num_rows)
        self.written += rows.num_rows
        if self.written % ROWS_PER_SHARD == 0:
            self._close()

    def _close(self) -> None:
        if self.writer:
            self.writer.close()
        self.writer = None


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


def _texts(values: Sequence[str | None]) -> pa.Array:
    return pa.array(values, pa.string())


def _json_texts(values: Sequence[Any]) -> pa.Array:
    return _texts([None if value is None else _json(value) for value in values])


def _values(texts: pa.Array) -> list[Any]:
    return [None if text is None else json.loads(text) for text in texts.to_pylist()]


def _turn_lists(lists: Sequence[Sequence[Mapping[str, Any]] | None]) -> pa.Array:
    """[[t, t], None, [t]] -> turns t t t, a list beginning at 0, none, one beginning at 2."""
    turns = [turn for turns in lists for turn in turns or ()]
    ends = itertools.accumulate(len(turns or ()) for turns in lists)
    starts = [0, *ends]
    offsets = [None if turns is None else start for start, turns in zip(starts, lists, strict=False)]
    fields = [
        (_json_texts if field.name in JSON_KEYS else _texts)([turn.get(field.name) for turn in turns]) for field in TURN
    ]
    return pa.ListArray.from_arrays(
        pa.array([*offsets, len(turns)], pa.int32()),
        pa.StructArray.from_arrays(fields, fields=list(TURN)),
        type=pa.list_(TURN),
    )


def _lists_of_turns(lists: pa.Array) -> list[list[dict[str, Any]] | None]:
    held = lists.flatten()
    turns: list[dict[str, Any]] = [{} for _ in range(len(held))]
    for number, field in enumerate(TURN):
        values = held.field(number)
        if values.null_count < len(values):
            for turn, value in zip(
                turns, _values(values) if field.name in JSON_KEYS else values.to_pylist(), strict=True
            ):
                if value is not None:
                    turn[field.name] = value
    following = iter(turns)
    lengths = lists.value_lengths().to_pylist()
    return [None if length is None else list(itertools.islice(following, length)) for length in lengths]


_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
