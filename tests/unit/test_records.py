"""Records: their ids, the way into a table and back, shards that depend on the rows alone."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.lib import files, records

ASKED = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
CALLING = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "a", "name": "add"}


def make(messages: Any = None, **more: Any) -> dict[str, Any]:
    return records.make(messages, **{"group": "", "source": "my.jsonl", "task": "chat", "meta": {"where": "1"}} | more)


ROWS = [
    make([ASKED, ANSWER], split="test"),
    make(kind="text", text="Once upon a time.", task="text"),
    make([ASKED, CALLING, RESULT, ANSWER], tools=[{"type": "function", "function": {"name": "add"}}]),
    make([ASKED], kind="preference", chosen=[ANSWER], rejected=[{"role": "assistant", "content": "5"}]),
    make([ASKED, ANSWER], kind="unpaired", label="false", group="Ann"),
]


def test_a_record_comes_back_from_a_table_as_it_was_made() -> None:
    table = records.table(ROWS)
    assert table.schema == records.RECORD
    assert records.rows(table) == ROWS
    assert records.rows(table.slice(1, 3)) == ROWS[1:4]
    assert records.rows(table.to_batches()[0].slice(2)) == ROWS[2:]
    assert records.rows(records.table([])) == []
    assert records.rows(table.select(["id", "messages"]))[0] == {key: ROWS[0][key] for key in ("id", "messages")}


def test_a_table_is_that_of_its_rows_one_by_one() -> None:
    plain = [{**row, "tools": None, "meta": "{}"} for row in ROWS if row["tools"] is None]
    made = records.table([{**row, "meta": {}} for row in plain])
    assert made.equals(pa.Table.from_pylist(plain, schema=records.RECORD))


def test_the_id_is_that_of_task_and_content_whatever_the_order_of_keys() -> None:
    plain = make([ASKED, {"role": "assistant", "content": "4"}])
    text = '["chat", [{"content": "2+2?", "role": "user"}, {"content": "4", "role": "assistant"}]]'
    assert plain["id"] == hashlib.sha256(text.encode()).hexdigest()
    turned = [dict(reversed(turn.items())) for turn in plain["messages"]]
    assert make(turned, group="other", source="other", split="test")["id"] == plain["id"]
    others = [make(plain["messages"], task="sums"), make(plain["messages"], kind="unpaired", label="true"), *ROWS]
    assert len({row["id"] for row in [plain, *others]}) == len(others) + 1


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 100])
def test_shards_depend_on_the_rows_and_not_on_how_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(records, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(records, "ROWS_PER_SHARD", 12)
    rows = [make([{**ASKED, "content": f"{number}?"}, ANSWER]) for number in range(31)]
    for folder, size in (("whole", 31), ("cut", cut)):
        (tmp_path / folder).mkdir()
        with records.Shards(tmp_path / folder) as shards:
            for start in range(0, len(rows), size):
                shards.write(records.table(rows[start : start + size]))
                shards.write(records.table([]))
    made = {path.name: files.sha256(path) for path in (tmp_path / "cut").iterdir()}
    assert made == {path.name: files.sha256(path) for path in (tmp_path / "whole").iterdir()}
    assert [pq.ParquetFile(path).metadata.num_rows for path in records.shards(tmp_path / "cut")] == [12, 12, 7]
    assert pq.ParquetFile(tmp_path / "cut/rows-00000.parquet").metadata.num_row_groups == 3
    assert records.read(tmp_path / "cut") == rows
