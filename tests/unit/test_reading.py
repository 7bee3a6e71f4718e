"""Reading: every kind of file gives the same rows, every fault one reason, and where blocks end changes nothing."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages.lib.errors import ConfigError, DataError, PipelineError
from stages.lib.rows import Unparsed
from stages.lib.schema.data import Source
from stages.lib.sources import json_text, reading, tables
from tests.data_settings import settings

PAIR = {"prompt": "2+2?", "completion": "4"}
ROWS = [PAIR, {"prompt": "größer?", "completion": 'say "no": {[,]}'}, {"prompt": "a\\", "completion": "b\nc"}]
PACKERS: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path: Path) -> list[tuple[str, Any]]:
    """All rows of a file with their places; each block goes through pickle, as to a worker."""
    blocks = [pickle.loads(pickle.dumps(block)) for block in reading.file_blocks(path, path.name)]
    return [found for block in blocks for found in reading.parsed(block)]


def rows(path: Path) -> list[Any]:
    return [row for _, row in read(path)]


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def written(folder: Path, name: str) -> Path:
    """ROWS in a file of the kind that its name says."""
    path, table = folder / name, pa.Table.from_pylist(ROWS)
    if name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1))
    elif name.endswith((".csv", ".tsv")):
        quoted = [list(PAIR), *([text.replace('"', '""') for text in row.values()] for row in ROWS)]
        comma = "," if name.endswith(".csv") else "\t"
        path.write_text("".join(comma.join(f'"{text}"' for text in row) + "\r\n" for row in quoted), newline="")
    elif name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".feather"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        lines(path, *ROWS)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "feather"])
def test_every_kind_of_file_gives_the_same_rows_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, f"my.{suffix}")
    assert rows(path) == ROWS
    for packed, pack in PACKERS.items():
        (tmp_path / (path.name + packed)).write_bytes(pack(path.read_bytes()))
        assert rows(tmp_path / (path.name + packed)) == ROWS


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(tmp_path / "my.txt") == [("my.txt:1", {"text": "one\r\ntwo\n"})]


@pytest.mark.parametrize("size", [64, 100, 150, 1 << 20])
def test_where_blocks_end_changes_no_row_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", size)
    monkeypatch.setattr(reading, "BLOCK_ROWS", 2)
    monkeypatch.setattr(json_text, "_CHUNK", 7 if size < 100 else size)
    content = [{**PAIR, "prompt": "x" * number} for number in range(0, 120, 3)]
    found = read(lines(tmp_path / "my.jsonl", *content, b"", PAIR))
    assert found == [(f"my.jsonl:{n}", row) for n, row in enumerate(content, start=1)] + [("my.jsonl:42", PAIR)]
    assert rows(written(tmp_path, "my.json")) == ROWS
    assert [where for where, _ in read(written(tmp_path, "my.csv"))] == ["my.csv:2", "my.csv:3", "my.csv:4"]


def test_a_block_of_an_arrow_file_holds_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    path = written(tmp_path, "my.feather")
    assert [block.first for block in reading.file_blocks(path, path.name)] == [1, 3]
    assert rows(path) == ROWS
    table = pa.table({"text": ["x" * 1000] * 1000})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert max(len(pickle.dumps(block)) for block in reading.file_blocks(path, path.name)) < 4000


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (b'{"prompt": "a", "completion": ', "bad_json", "column"),
        (b'{"prompt": "\x01", "completion": "b"}', "bad_json", "control character"),
        (b'{"prompt": "\xff", "completion": "b"}', "bad_utf8", "byte 13"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "bad_utf8", "byte 13"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "surrogate", "surrogate"),
        (b'{"prompt": "a", "\\ud800": "b"}', "surrogate", "surrogate"),
        (b'{"prompt": "a", "completion": NaN}', "not_a_number", "NaN"),
        (b'{"prompt": "a", "completion": -Infinity}', "not_a_number", "Infinity"),
        (b'{"prompt": "a", "completion": 1e999}', "not_a_number", "1e999"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "repeated_key", "prompt"),
        (b'{"prompt": "\\":", "completion": "b", "prompt" : "c"}', "repeated_key", "prompt"),
        (b'{"prompt": "a:", "meta": [{"x": 1, "\\u0078": 2}]}', "repeated_key", "'x' stands twice"),
        (b"[" * 100_000, "bad_json", "more than 100 deep"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, "bad_json", "more than 100 deep"),
        (b'{"prompt": "a", "completion": 1' + b"0" * 5000 + b"}", "bad_json", "digits"),
        (b"\x00", "bad_json", "column 1"),
        (b"[1, 2]", "no_object", "list"),
        (b'"text"', "no_object", "str"),
        (b"null", "no_object", "NoneType"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place_and_the_others_are_kept(
    tmp_path: Path, line: bytes, code: str, reason: str
) -> None:
    first, (where, bad), last = read(lines(tmp_path / "my.jsonl", PAIR, line, PAIR))
    assert (first[1], last) == (PAIR, ("my.jsonl:3", PAIR))
    assert (where, type(bad), bad.code) == ("my.jsonl:2", Unparsed, code)
    assert reason in bad.reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": 123456789012345678901, "b": -0, "c": 1e5, "d": 0.1}',
        b'{"a": 18446744073709551616, "b": [9223372036854775807, 1e300]}',
        rb'{"a\\": "\":", "b": ":", "c" : ": \\\": ", "d": "\\"}',
        b'{"": {"": {"": []}}}',
        b'{"a": ' * 99 + b"{}" + b"}" * 99,
        b'\t{"a"\r:"\\u00e9\\ud83d\\ude00\x7f"} \r',
    ],
)
def test_a_good_line_is_read_as_the_json_module_reads_it(line: bytes) -> None:
    assert json_text.value(line) == json.loads(line)
    assert repr(json_text.value(line)) == repr(json.loads(line))


def test_plain_rows_are_read_without_the_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "_strict", None)
    for row in ROWS:
        assert json_text.value(json.dumps({"messages": [row, row]}).encode()) == {"messages": [row, row]}


def test_a_byte_order_mark_windows_line_ends_and_empty_lines_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n  \n" + json.dumps(PAIR).encode())
    assert read(path) == [("my.jsonl:1", PAIR), ("my.jsonl:4", PAIR)]


@pytest.mark.parametrize("block", [16, 100, 1 << 20])
def test_a_line_longer_than_can_be_read_is_skipped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_text, "MAX_BYTES", 64)
    monkeypatch.setattr(reading, "BLOCK_BYTES", block)
    path = lines(tmp_path / "my.jsonl", PAIR, {"prompt": "x" * 300, "completion": "y"}, PAIR, b"[" * 65)
    found = [(where, getattr(row, "code", "")) for where, row in read(path)]
    assert found == [("my.jsonl:1", ""), ("my.jsonl:2", "long_line"), ("my.jsonl:3", ""), ("my.jsonl:4", "long_line")]


def test_a_line_of_50_mb_is_skipped_whole(tmp_path: Path) -> None:
    lines(tmp_path / "my.jsonl", PAIR, b'{"prompt": "' + b"x" * 50_000_000 + b'"}', PAIR)
    blocks = list(reading.file_blocks(tmp_path / "my.jsonl", "my.jsonl"))
    assert max(len(pickle.dumps(block)) for block in blocks) < 1000
    assert [getattr(row, "code", row) for _, row in read(tmp_path / "my.jsonl")] == [PAIR, "long_line", PAIR]


def test_an_item_or_a_csv_line_longer_than_can_be_read_is_skipped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "MAX_BYTES", 64)
    monkeypatch.setattr(json_text, "_CHUNK", 16)
    (tmp_path / "my.json").write_text(json.dumps([PAIR, {"prompt": "x" * 300}, PAIR]))
    (tmp_path / "my.csv").write_text("prompt,completion\n2+2?,4\n" + "x" * 300 + ",y\n2+2?,4\n")
    for name in ("my.json", "my.csv"):
        first, bad, last = rows(tmp_path / name)
        assert (first, bad.code, last) == (PAIR, "long_line", PAIR)


def test_items_of_a_json_list_are_placed_by_their_line_and_told_apart(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_bytes(b'\xef\xbb\xbf\n[\n{"a":\n1}, {"a": 1, "a": 2},\n\n"]", 3 ,{"a": "\xff"}\n,]\n')
    found = read(tmp_path / "my.json")
    assert found[0] == ("my.json:3", {"a": 1})
    assert [(where, row.code) for where, row in found[1:]] == [
        ("my.json:4", "repeated_key"),
        ("my.json:6", "no_object"),
        ("my.json:6", "no_object"),
        ("my.json:6", "bad_utf8"),
    ]


def test_a_list_read_in_pieces_of_any_size_gives_the_same_items(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rb' [{"a": "x\"]y\\"}, "a\"", -3' + b"\n" + rb"true,[{}, []], ]  "
    expected = [(1, rb'{"a": "x\"]y\\"}'), (1, rb'"a\""'), (1, b"-3\ntrue"), (2, b"[{}, []]")]
    for size in range(2, len(text) + 1):
        monkeypatch.setattr(json_text, "_CHUNK", size)
        assert list(json_text.items(io.BytesIO(text))) == expected


def test_csv_rows_with_another_number_of_fields_or_bad_text_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_bytes(b'prompt,completion\na\nb,\xff\n"x"y,1\n\n2+2?,4\n')
    found = read(tmp_path / "my.csv")
    assert [(where, row.code) for where, row in found[:3]] == [
        ("my.csv:2", "bad_csv"),
        ("my.csv:3", "bad_utf8"),
        ("my.csv:4", "bad_csv"),
    ]
    assert found[3:] == [("my.csv:6", PAIR)]


def test_a_csv_field_may_be_longer_than_the_library_allows_by_itself(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text(f"prompt,completion\n{'x' * 200_000},4\n")
    assert len(rows(tmp_path / "my.csv")[0]["prompt"]) == 200_000


def test_a_value_of_a_table_that_cannot_be_read_costs_its_row_only(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    times = pa.array([0, 0, 2**62], type=pa.timestamp("us"))
    pq.write_table(pa.table({"text": texts, "time": times}), tmp_path / "my.parquet")
    first, *bad = rows(tmp_path / "my.parquet")
    assert first["text"] == "a"
    assert [row.code for row in bad] == ["bad_utf8", "bad_value"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my.jsonl", b"", "is empty"),
        ("my.jsonl", b" \n\n", "is empty"),
        ("my.jsonl", b"PAR1 and so on", "found parquet data in it, expected jsonl"),
        ("my.jsonl", b'\xff\xfe{\x00"\x00', "found UTF-16 data"),
        ("my.jsonl", b'{\n "prompt": 1\n}\n', "is an object over several lines"),
        ("my.jsonl", b'{"a": 1}\r{"a": 2}\r', "lines end in CR alone"),
        ("my.json", b"\x1f\x8b\x08", "found gzip data"),
        ("my.csv", b"PK\x03\x04", "found zip data"),
        ("my.parquet", b'{"prompt": 1}', "found no data in it, expected parquet"),
        ("my.parquet", b"PAR1 cut short", "no readable Parquet file"),
        ("my.arrow", b"ARROW1 cut short", "no readable Arrow file"),
        ("my.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00", r"my\.arrow: has no end-of-stream mark"),
        ("my.feather", b"FEA1", "found feather version 1 data"),
        ("my.xlsx", b"PK\x03\x04", "found a .xlsx file, expected .jsonl"),
        ("my.json", b'[{"prompt": "a"', "my.json:1: the list is not closed: the file seems cut short"),
        ("my.json", b'[{"prompt": "a"}', "cut short"),
        ("my.json", b'[{"prompt": "a"}]\n[{"prompt": "b"}]', r"""found '\[{"prompt": "b"}\]' after the end"""),
        ("my.json", b"[1,\n{'a': 1}]", "my.json:2: no JSON .*Mend it"),
        ("my.json", b'"text"', "expected a JSON list"),
        ("my.csv", b"a,a\n1,2\n", "a column name stands twice: a, a"),
        ("my.csv", b'a,b\n1,2\n"3,4\n5,6\n', r"my\.csv:3: the row that begins here opens a quote"),
        ("my.csv.gz", b"a,b\n1,2\n", "found no data in it, expected gzip"),
        ("my.csv.gz", gzip.compress(b""), "is empty"),
        ("my.csv.gz", gzip.compress(b"PAR1"), "found parquet data in it, expected csv"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt", "parquet"])
def test_a_compressed_file_that_is_cut_short_is_an_error_and_no_end(tmp_path: Path, packed: str, suffix: str) -> None:
    content = b"[" + b",".join(b'{"prompt": "%d"}\n' % number for number in range(5000)) + b"]"
    whole = PACKERS[packed](b"PAR1" + content if suffix == "parquet" else content)
    (tmp_path / f"my.{suffix}{packed}").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=rf"my\.{suffix}\{packed}: the .* broken or cut short.*data\.path"):
        read(tmp_path / f"my.{suffix}{packed}")


def test_a_folder_gives_its_files_of_known_kinds_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "a.jsonl.dvc", "README.md", ".hidden/x.jsonl", ".y.jsonl"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text("prompt,completion\n1,2\n" if name.endswith("csv") else '{"a": 1}\n')
    found = list(reading.blocks(settings(path=str(tmp_path / "raw"))))
    assert [(block.source, block.name) for block in found] == [("", "a/z.csv"), ("", "b.jsonl")]
    named = reading.blocks(settings(path=str(tmp_path / "raw/**/*.csv")))
    assert [block.name for block in named] == ["a/z.csv"]
    with pytest.raises(DataError, match=r"holds no file of a known kind, expected \.jsonl.*Change data\.path"):
        list(reading.blocks(settings(path=str(tmp_path / "raw/*.parquet"))))


def test_sources_stand_in_the_folder_of_the_section_and_come_by_name(tmp_path: Path) -> None:
    for name in ("chats/a.jsonl", "chats/b.jsonl", "more.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, PAIR)
    sources = {"two": {"path": "more.jsonl"}, "one": {"path": "chats"}, "whole": {"path": str(tmp_path / "more.jsonl")}}
    found = [(block.source, block.name) for block in reading.blocks(settings(path=str(tmp_path), sources=sources))]
    assert found == [
        ("one", "chats/a.jsonl"),
        ("one", "chats/b.jsonl"),
        ("two", "more.jsonl"),
        ("whole", "more.jsonl"),
    ]


def test_a_path_or_a_link_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "outside.jsonl", PAIR)
    (tmp_path / "raw").mkdir()
    sources = {"mine": {"path": "../outside.jsonl"}}
    with pytest.raises(ConfigError, match=r"data\.sources\.mine\.path: found '\.\./outside\.jsonl', which leaves"):
        list(reading.blocks(settings(path=str(tmp_path / "raw"), sources=sources)))
    os.symlink(tmp_path / "outside.jsonl", tmp_path / "raw" / "my.jsonl")
    for changes in ({}, {"sources": {"mine": {"path": "my.jsonl"}}}):
        with pytest.raises(ConfigError, match=r"my\.jsonl is a link .* out of .*raw"):
            list(reading.blocks(settings(path=str(tmp_path / "raw"), **changes)))
    (tmp_path / "raw" / "my.jsonl").unlink()
    os.symlink(tmp_path, tmp_path / "raw" / "all")
    with pytest.raises(ConfigError, match="all is a link to a folder"):
        list(reading.blocks(settings(path=str(tmp_path / "raw"))))


def test_rows_of_documentation_come_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(f"a.py:{number}", {"messages": []}) for number in range(3)]
    monkeypatch.setattr(reading.python_docs, "rows", lambda packages, max_chars: iter(found))
    monkeypatch.setattr(reading, "BLOCK_ROWS", 2)
    blocks = list(reading.blocks(settings(source=Source.python_docs, packages=["a"])))
    assert [block.first for block in blocks] == [1, 3]
    assert [pair for block in blocks for pair in reading.parsed(block)] == found


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: not found.*data\.path"):
        list(reading.blocks(settings(path=str(tmp_path / "absent.jsonl"))))


def test_a_file_that_a_queued_run_cannot_see_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queued").mkdir()
    (tmp_path / "user").mkdir()
    lines(tmp_path / "user" / "my.jsonl", PAIR)
    monkeypatch.chdir(tmp_path / "queued")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "user"))
    with pytest.raises(PipelineError, match=r"dvc add my\.jsonl && git add my\.jsonl\.dvc"):
        list(reading.blocks(settings(path="my.jsonl")))
