"""Hostile files: each ends in rows and rejections or in one error, and no good row is lost."""

import json
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.lib.errors import DataError
from stages.lib.rows import Unfit, Unparsed
from stages.lib.sources import json_text, reading
from tests.corpus import make

CORPUS = make.FOLDER
EXPECTED: dict[str, dict[str, Any]] = json.loads(CORPUS.with_name("expected.json").read_text())
GOOD = re.compile(r"good row \d+")


def read(path: Path) -> list[tuple[str, Any]]:
    return [found for block in reading.file_blocks(path, path.name) for found in reading.parsed(block)]


def prompts(rows: list[tuple[str, Any]]) -> set[str]:
    """Those of good rows, whatever the format."""
    found = set()
    for _, row in rows:
        if isinstance(row, dict):
            turns = row.get("messages")
            first = turns[0] if isinstance(turns, list) and turns else None
            prompt = first.get("content") if isinstance(first, dict) else row.get("prompt")
            found |= {prompt} if isinstance(prompt, str) and GOOD.fullmatch(prompt) else set()
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", sorted({name.split("_")[0] for name in EXPECTED}))
def test_every_hostile_file_is_accounted_for_row_by_row_or_refused_with_one_message(kind: str) -> None:
    """One test a kind: hundreds of test cases would cost more than what they do."""
    for name, expected in EXPECTED.items():
        if not name.startswith(f"{kind}_"):
            continue
        if expected["refused"]:
            with pytest.raises(DataError, match=f"^{re.escape(name)}.*({expected['refused']})"):
                read(CORPUS / name)
            continue
        rows = read(CORPUS / name)
        assert len(rows) == expected["rows"], name
        assert all(isinstance(row, (dict, Unparsed)) for _, row in rows), name
        assert len({where for where, _ in rows}) == len(rows) or name.endswith("json"), name
        assert prompts(rows) == {f"good row {number}" for number in expected["good"]}, name


def test_the_corpus_is_what_its_script_makes() -> None:
    made = make.corpus()
    assert set(made) == {path.name for path in CORPUS.iterdir()} == set(EXPECTED)
    for name, hostile in made.items():
        found = EXPECTED[name]
        assert (hostile.rows, list(hostile.good), hostile.refused) == (found["rows"], found["good"], found["refused"])
        if name.endswith((".jsonl", ".json", ".csv", ".txt")) and not name.startswith(("packed", "other")):
            assert (CORPUS / name).read_bytes() == hostile.content, name


def test_each_bad_line_of_the_corpus_is_rejected_with_a_code_and_a_reason() -> None:
    for name in make.LINES:
        bad = [row for _, row in read(CORPUS / f"line_{name}.jsonl") if isinstance(row, Unparsed)]
        assert [bool(row.code and row.reason) for row in bad] == [True], name


HOW_LONG = pytest.mark.parametrize("examples", [60, pytest.param(5_000, marks=pytest.mark.slow)])


def searched(examples: int) -> settings:
    """The same examples every time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
texts = st.text(alphabet=string.punctuation + string.whitespace + "0a", max_size=40)
lines = st.one_of(
    st.binary(max_size=60),
    texts.map(str.encode),
    values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(["a", '"', "\\", ":", ": ", '":', '\\"', "é"]), values | texts, max_size=4).map(
        lambda value: json.dumps(value, ensure_ascii=len(value) % 2 == 0).encode()
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good line in which a few bytes are replaced, left out, put in or doubled."""
    line = bytearray(make.compact(make.chat(9)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(line) - 1))
        new = draw(st.sampled_from(b'{}[]":,\\ \x00\xff0eN\xc3') | st.integers(0, 255))
        what = draw(st.sampled_from(["replace", "insert", "drop", "double"]))
        if what == "replace":
            line[at] = new
        elif what == "insert":
            line.insert(at, new)
        elif what == "drop":
            del line[at : at + draw(st.integers(1, 9))]
        else:
            line[at:at] = line[at : at + draw(st.integers(1, 40))]
    return bytes(line)


@contextmanager
def sized(block: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        patch.setattr(json_text, "_CHUNK", block)
        yield


blocks = st.sampled_from([1, 7, 64, 1 << 20])


@HOW_LONG
def test_lines_of_any_bytes_cost_no_good_row_beside_them(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "fuzz.jsonl"

    @searched(examples)
    @given(hostile=st.lists(lines | mutated(), max_size=4), block=blocks)
    def law(hostile: list[bytes], block: int) -> None:
        whole = b"\n".join([make.compact(make.chat(1)), *hostile, make.compact(make.chat(2))])
        path.write_bytes(whole)
        with sized(block):
            rows = read(path)
        numbered = enumerate(whole.split(b"\n"), start=1)
        assert [where for where, _ in rows] == [f"fuzz.jsonl:{number}" for number, line in numbered if line.strip()]
        assert (rows[0][1], rows[-1][1]) == (make.chat(1), make.chat(2))

    law()


@HOW_LONG
def test_the_fast_reader_and_the_strict_one_agree_on_every_text(examples: int) -> None:
    @searched(examples)
    @given(text=lines | mutated())
    def law(text: bytes) -> None:
        assert outcome(json_text.value, text) == outcome(json_text._strict, text)

    law()


def outcome(read: Any, text: bytes) -> str:
    try:
        return repr(read(text))
    except Unfit as unfit:
        return f"{unfit.code}: {unfit.reason}"


@HOW_LONG
def test_a_list_of_any_values_gives_as_many_rows(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "fuzz.json"

    @searched(examples)
    @given(items=st.lists(values, max_size=4), block=blocks, indent=st.sampled_from([None, 0, 1]))
    def law(items: list[Any], block: int, indent: int | None) -> None:
        path.write_text(json.dumps([make.chat(1), *items, make.chat(2)], indent=indent))
        with sized(block):
            rows = read(path)
        assert len(rows) == len(items) + 2
        assert (rows[0][1], rows[-1][1]) == (make.chat(1), make.chat(2))

    law()


@HOW_LONG
def test_a_file_of_the_corpus_with_other_bytes_in_it_ends_in_rows_or_one_error(tmp_path: Path, examples: int) -> None:
    names = [
        name for name in sorted(EXPECTED) if not EXPECTED[name]["refused"] and not name.startswith(("line", "shape"))
    ]

    @searched(examples)
    @given(name=st.sampled_from(names), places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
    def law(name: str, places: list[tuple[float, int]]) -> None:
        content = bytearray((CORPUS / name).read_bytes())
        for place, byte in places:
            content[min(int(place * len(content)), len(content) - 1)] = byte
        (tmp_path / name).write_bytes(content)
        with suppress(DataError):
            read(tmp_path / name)

    law()
