"""Rows of the user's own file: JSON Lines, JSON, CSV or Parquet, in the forms in which chats are written."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib import environment, records, rows
from stages.lib.errors import DataError
from stages.lib.rows import Rejection, Unfit
from stages.lib.schema.data import Format

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAGIC = {b"PAR1": "parquet", b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"%PDF": "pdf"}
MAX_LINE_BYTES = 16 << 20
KEYS = {  # what a row of each format must have
    Format.messages: {"messages"},
    Format.alpaca: {"instruction", "output"},
    Format.prompt_completion: {"prompt", "completion"},
}

Found = tuple[str, Any]  # (`file:line`, a parsed row or the Unfit that parsing met)


def records_of(
    path: Path, format: Format, columns: Mapping[str, str], max_chars: int, *, name: str
) -> Iterator[dict[str, Any] | Rejection]:
    """Every row of a file, as a record or as a rejection, in the order of the file.

    Args: format: auto takes the form of the first row that has one. columns: for CSV, {prompt: <column>,
        completion: <column>[, system: <column>, group: <column>, task: <column>]}; empty when the names are these.
        max_chars: longest conversation. name: the file's name in `where` and `source`.
    Raises: DataError, when the file is missing, empty, of another kind than its name says, or lacks the columns.
    """
    for where, found in parsed(path, name):
        try:
            if isinstance(found, Unfit):
                raise found
            if not isinstance(found, Mapping):
                raise Unfit("no_object", f"the row is a {type(found).__name__}, expected an object with named fields")
            if format is Format.auto:
                format = detected(found, columns)
            messages = rows.conversation(messages_of(found, format, columns), max_chars)
            yield records.make(
                messages,
                group=_label(found, columns.get("group", "group"), "bad_group", otherwise=""),
                source=name,
                task=_label(found, columns.get("task", "task"), "bad_task", otherwise="chat"),
                meta={"where": where},
            )
        except Unfit as unfit:
            yield rows.rejection(where, unfit, unfit.row if isinstance(unfit, Unparsed) else found)


class Unparsed(Unfit):
    """A line that could not even be parsed, with its text."""

    def __init__(self, code: str, reason: str, row: str) -> None:
        super().__init__(code, reason)
        self.row = row


def detected(row: Mapping[str, Any], columns: Mapping[str, str]) -> Format:
    """The format whose keys a row has; configured columns win."""
    if columns:
        return Format.csv
    for format, keys in KEYS.items():
        if keys <= set(row):
            return format
    forms = "; ".join(f"{format}: {', '.join(sorted(keys))}" for format, keys in KEYS.items())
    raise Unfit(
        "unknown_format",
        f"its keys are {', '.join(sorted(map(str, row))[:8]) or 'none'}, expected those of a known format ({forms}). "
        "Name your columns: data.columns={prompt: <column>, completion: <column>}",
    )


def messages_of(row: Mapping[str, Any], format: Format, columns: Mapping[str, str]) -> Any:
    """The turns of a row as its format writes them down, unchecked.

    Raises: Unfit, when a field of the format is missing.
    """
    if format is Format.messages:
        return _field(row, "messages")
    if format is Format.alpaca:
        question, extra = _field(row, "instruction"), row.get("input")
        prompt = f"{question}\n\n{extra}" if isinstance(extra, str) and extra.strip() else question
        completion = _field(row, "output")
    else:
        prompt = _field(row, columns.get("prompt", "prompt"))
        completion = _field(row, columns.get("completion", "completion"))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    system = row.get(columns.get("system", "system"))
    return [{"role": "system", "content": system}, *turns] if system else turns


def _field(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise Unfit("missing_field", f"no {key!r}, it has {', '.join(sorted(map(str, row))[:8])}")
    return row[key]


def _label(row: Mapping[str, Any], key: str, code: str, *, otherwise: str) -> str:
    """A name the user gave a row: its group or its task; whole numbers count as names.

    A table turns a column of numbers with gaps into floats: 3.0 is the name 3, NaN is a gap.

    Raises: Unfit with `code`, for a value that is no name; unnamed, such rows would each be a group of their own.
    """
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value or value == "":
        return otherwise
    if not isinstance(value, (str, int)):
        raise Unfit(code, f"{key} is {value!r}, expected text or a whole number. Change the column, or data.columns")
    return str(value)


def parsed(path: Path, name: str) -> Iterator[Found]:
    """(`file:line`, row) for each row of a file; a row that cannot be parsed comes as an Unfit instead."""
    kind = _kind(path, name)
    readers = {"jsonl": _json_lines, "json": _json_array, "csv": _csv_rows, "parquet": _parquet_rows}
    return readers[kind](path, name)


def _kind(path: Path, name: str) -> str:
    if not path.exists():
        raise DataError(f"{name}: not found. {_where_it_should_be(path)}")
    if path.is_dir():
        raise DataError(f"{name}: is a folder, expected one file. Change data.path.")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{name}: found a {path.suffix or 'nameless'} file, expected {', '.join(SUFFIXES)}. Change data.path."
        )
    with path.open("rb") as file:
        start = file.read(4096)
    if not start.strip():
        raise DataError(f"{name}: is empty, expected rows. Change data.path.")
    kind = SUFFIXES[path.suffix]
    held = next((other for magic, other in MAGIC.items() if start.startswith(magic)), None)
    if held != (kind if kind == "parquet" else None):
        raise DataError(
            f"{name}: found {held or 'no'} data in it, expected {kind}, as its name says. Change data.path."
        )
    if kind == "json" and start.lstrip().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return "jsonl"
    return kind


def _where_it_should_be(path: Path) -> str:
    user_copy = environment.root() / path
    if not path.is_absolute() and environment.root() != Path.cwd().resolve() and user_copy.exists():
        return (
            "It lies in your working copy, but a queued run sees only what git or DVC tracks. Type "
            f"`dvc add {path} && git add {path}.dvc`, or name it by its whole path: -S data.path={user_copy}"
        )
    return "Expected the file that data.path names; a relative path starts at the repository."


def _json_lines(path: Path, name: str) -> Iterator[Found]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{name}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while rest := file.readline(MAX_LINE_BYTES):  # skip what remains of it
                    if rest.endswith(b"\n"):
                        break
                reason = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"
                yield where, Unparsed("long_line", reason, line[:200].decode("utf-8", "replace"))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if line.strip():
                yield where, _parsed_line(line)


def _parsed_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as fault:
        reason = f"byte {fault.start + 1} of the line is no UTF-8"
        return Unparsed("bad_utf8", reason, line.decode("utf-8", "backslashreplace"))
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except json.JSONDecodeError as fault:
        return Unparsed("bad_json", f"{fault.msg} at column {fault.colno}", text)
    except Unfit as unfit:
        return Unparsed(unfit.code, unfit.reason, text)
    except (RecursionError, ValueError) as fault:
        return Unparsed("bad_json", str(fault), text)


def _refuse(constant: str) -> Any:
    raise Unfit("not_a_number", f"holds {constant}, which is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if repeated:
        raise Unfit("repeated_key", f"the key {repeated[0]!r} stands twice in one object")
    return dict(pairs)


def _json_array(path: Path, name: str) -> Iterator[Found]:
    """Items of one JSON list, each with the line it begins in."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"{name}: byte {fault.start + 1} is no UTF-8, expected UTF-8 text. Convert the file.") from None
    start = len(text) - len(text.lstrip())
    if text[start] != "[":
        raise DataError(
            f"{name}: begins with {text[start]!r}, expected a JSON list of objects, or JSON Lines (.jsonl)."
        )
    decoder = json.JSONDecoder(object_pairs_hook=_unique_later)
    position, line, counted = start + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text):
            raise DataError(f"{name}:{line}: the list is not closed: the file seems cut short. Expected a ']'.")
        if text[position] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as fault:
            where = line if isinstance(fault, RecursionError) else fault.lineno
            raise DataError(
                f"{name}:{where}: no JSON ({fault}). Mend it, or write one object per line (.jsonl)."
            ) from None
        yield f"{name}:{line}", _parsed_line(text[position:end].encode("utf-8", "surrogatepass"))
        position = end


def _unique_later(pairs: list[tuple[str, Any]]) -> None:
    """The first pass only looks for the end of an item; the second one, over its text, reads it."""


def _csv_rows(path: Path, name: str) -> Iterator[Found]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        header = reader.fieldnames or []
        if len(set(header)) != len(header):
            raise DataError(f"{name}:1: a column name stands twice: {', '.join(header)}.")
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as fault:
                yield where, Unparsed("bad_csv", str(fault), "")
                continue
            if None in row or None in row.values():
                reason = f"another number of fields than the header's {len(header)}"
                yield where, Unparsed("bad_csv", reason, json.dumps(list(row.values()), default=str))
            elif any("\udc80" <= letter <= "\udcff" for value in row.values() for letter in value):
                yield where, Unparsed("bad_utf8", "the row is no UTF-8", json.dumps(row))
            else:
                yield where, row


def _parquet_rows(path: Path, name: str) -> Iterator[Found]:
    try:
        table = pq.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (pa.ArrowException, OSError) as fault:
        raise DataError(f"{name}: no readable Parquet file ({str(fault).splitlines()[0]}). Change data.path.") from None
