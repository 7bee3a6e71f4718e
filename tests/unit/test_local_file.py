"""The user's own file: every form gives the same record, every fault one reason."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.lib.errors import DataError
from stages.lib.rows import Rejection
from stages.lib.schema.data import Format
from stages.lib.sources import local_file

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
ALPACA = {"instruction": "2+2?", "input": "", "output": "4"}
PAIR = {"prompt": "2+2?", "completion": "4"}


def read(
    path: Path, format: Format = Format.auto, columns: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[Rejection]]:
    found = list(local_file.records_of(path, format, columns or {}, 1000, name=path.name))
    return [row for row in found if isinstance(row, dict)], [row for row in found if isinstance(row, Rejection)]


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def test_every_form_of_one_conversation_gives_the_same_record(tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{number}.jsonl", row) for number, row in enumerate([CHAT, ALPACA, PAIR])]
    (tmp_path / "list.json").write_text(json.dumps([CHAT]))
    (tmp_path / "table.csv").write_text("prompt,completion\n2+2?,4\n")
    pd.DataFrame([CHAT]).to_parquet(tmp_path / "table.parquet")
    paths += [tmp_path / name for name in ("list.json", "table.csv", "table.parquet")]
    assert {tuple(row["id"] for row in read(path)[0]) for path in paths} == {(read(paths[0])[0][0]["id"],)}


def test_csv_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text('id,question,reply,customer\n1,"2+2?\nplease",4,Ann\n')
    columns = {"prompt": "question", "completion": "reply", "group": "customer"}
    ((row,), rejected) = read(tmp_path / "my.csv", Format.csv, columns)
    assert [turn["content"] for turn in row["messages"]] == ["2+2?\nplease", "4"]
    assert row["group"] == "Ann"
    assert not rejected


def test_group_and_task_of_a_row_are_taken_over_and_key_order_changes_nothing(tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", {**PAIR, "group": 7, "task": "sums"})
    other = lines(tmp_path / "b.jsonl", dict(reversed({**PAIR, "group": 7, "task": "sums"}.items())))
    (first, second) = (read(path)[0][0] for path in (one, other))
    assert (first["group"], first["task"], first["id"]) == ("7", "sums", second["id"])


def test_groups_of_a_number_column_with_gaps_keep_their_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame([{**PAIR, "group": group} for group in (3, None, 4)])
    assert frame["group"].dtype == float
    frame.to_parquet(tmp_path / "my.parquet")
    assert [row["group"] for row in read(tmp_path / "my.parquet")[0]] == ["3", "", "4"]


@pytest.mark.parametrize(("key", "code"), [("group", "bad_group"), ("task", "bad_task")])
@pytest.mark.parametrize("value", [3.5, ["a"], {"name": "a"}])
def test_a_group_or_task_that_is_no_name_is_rejected(tmp_path: Path, key: str, code: str, value: object) -> None:
    _, (rejected,) = read(lines(tmp_path / "my.jsonl", {**PAIR, key: value}))
    assert rejected.code == code
    assert f"{key} is {value!r}, expected text or a whole number" in rejected.reason


def test_alpaca_input_and_a_system_text_are_part_of_the_prompt(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief."})
    assert [turn["content"] for turn in read(path)[0][0]["messages"]] == ["Be brief.", "Add.\n\n2 2", "4"]


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (b'{"prompt": "a", "completion": ', "bad_json", "column"),
        (b'{"prompt": "\x01", "completion": "b"}', "bad_json", "control character"),
        (b'{"prompt": "\xff", "completion": "b"}', "bad_utf8", "byte 13"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', "nul", "NUL"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "surrogate", "surrogate"),
        (b'{"prompt": "a", "completion": NaN}', "not_a_number", "NaN"),
        (b'{"prompt": "a", "completion": -Infinity}', "not_a_number", "Infinity"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "repeated_key", "prompt"),
        (b"[" * 100_000, "bad_json", "recursion"),
        (b'{"prompt": "a", "completion": 1' + b"0" * 5000 + b"}", "bad_json", "digits"),
        (b"[1, 2]", "no_object", "list"),
        (b'"text"', "no_object", "str"),
        (b'{"prompt": "a"}', "missing_field", "completion"),
        (b'{"prompt": "a", "completion": null}', "no_text", "null"),
        (b'{"prompt": "a", "completion": " "}', "empty_answer", "empty"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place_and_the_others_are_kept(
    tmp_path: Path, line: bytes, code: str, reason: str
) -> None:
    kept, (rejected,) = read(lines(tmp_path / "my.jsonl", PAIR, line, {**PAIR, "prompt": "3+3?"}))
    assert len(kept) == 2
    assert (rejected.where, rejected.code) == ("my.jsonl:2", code)
    assert reason in rejected.reason


def test_a_byte_order_mark_windows_line_ends_and_empty_lines_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode() + b"\r\n")
    kept, rejected = read(path)
    assert (len(kept), rejected) == (2, [])
    assert json.loads(kept[1]["meta"]) == {"where": "my.jsonl:3"}


def test_a_line_longer_than_can_be_read_is_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_file, "MAX_LINE_BYTES", 64)
    kept, (rejected,) = read(lines(tmp_path / "my.jsonl", {"prompt": "x" * 300, "completion": "y"}, PAIR))
    assert (len(kept), rejected.code, json.loads(kept[0]["meta"])["where"]) == (1, "long_line", "my.jsonl:2")


def test_a_format_that_was_named_is_not_guessed(tmp_path: Path) -> None:
    kept, (rejected,) = read(lines(tmp_path / "my.jsonl", PAIR), Format.alpaca)
    assert (kept, rejected.code) == ([], "missing_field")


def test_rows_of_no_known_form_say_which_keys_they_have_and_what_to_name(tmp_path: Path) -> None:
    _, (rejected,) = read(lines(tmp_path / "my.jsonl", {"question": "2+2?", "reply": "4"}))
    assert rejected.code == "unknown_format"
    assert "question, reply" in rejected.reason
    assert "data.columns" in rejected.reason


def test_items_of_a_json_list_are_placed_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('[\n {"prompt": "2+2?", "completion": "4"},\n {"prompt": "3+3?"}\n]\n')
    kept, (rejected,) = read(tmp_path / "my.json")
    assert (len(kept), rejected.where, rejected.code) == (1, "my.json:3", "missing_field")


def test_csv_rows_with_too_few_fields_or_bad_text_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_bytes(b"prompt,completion\na\nb,\xff\n2+2?,4\n")
    kept, rejected = read(tmp_path / "my.csv")
    assert len(kept) == 1
    assert [(row.where, row.code) for row in rejected] == [("my.csv:2", "bad_csv"), ("my.csv:3", "bad_utf8")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my.jsonl", b"", "is empty"),
        ("my.jsonl", b" \n\n", "is empty"),
        ("my.jsonl", b"PAR1 and so on", "found parquet data in it, expected jsonl"),
        ("my.json", b"\x1f\x8b\x08", "found gzip data"),
        ("my.csv", b"PK\x03\x04", "found zip data"),
        ("my.parquet", b'{"prompt": 1}', "found no data in it, expected parquet|no data"),
        ("my.parquet", b"PAR1 cut short", "no readable Parquet file"),
        ("my.xlsx", b"PK\x03\x04", "found a .xlsx file, expected .jsonl"),
        ("my.json", b'[{"prompt": "a"', "my.json:1: no JSON"),
        ("my.json", b'[{"prompt": "a"}', "cut short"),
        ("my.json", b'"text"', "expected a JSON list"),
        ("my.csv", b"a,a\n1,2\n", "a column name stands twice"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: not found.*data\.path"):
        read(tmp_path / "absent.jsonl")


def test_a_file_that_a_queued_run_cannot_see_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queued").mkdir()
    (tmp_path / "user").mkdir()
    lines(tmp_path / "user" / "my.jsonl", PAIR)
    monkeypatch.chdir(tmp_path / "queued")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "user"))
    with pytest.raises(DataError, match=r"dvc add my\.jsonl && git add my\.jsonl\.dvc"):
        read(Path("my.jsonl"))
