"""Tables as sources: CSV and TSV line by line, Parquet and Arrow batch by batch."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.errors import DataError
from stages.lib.rows import Unparsed
from stages.lib.sources import json_text

ROWS = 1024  # of a batch
TextRow = tuple[int, dict[str, str] | Unparsed, int]

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def text_rows(stream: BinaryIO, name: str, delimiter: str) -> Iterator[TextRow]:
    """(line in which the row begins, row, its size) for each row of a CSV file with a header.

    Raises: DataError, when a column stands twice, or a quote is opened and never closed: what follows it is no row.
    """
    file = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _text_rows(file, name, delimiter)
    finally:
        file.detach()


def _text_rows(file: io.TextIOWrapper, name: str, delimiter: str) -> Iterator[TextRow]:
    csv.field_size_limit(json_text.MAX_BYTES)  # one setting for the whole process; else 128 KiB
    long_lines: list[int] = []
    reader = csv.reader(_lines(file, long_lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            if "unexpected end" in str(fault):
                raise DataError(
                    f'{name}:{line}: the row that begins here opens a quote (") that is never closed. Close it, and '
                    'double each quote inside a text ("").'
                ) from None
            if not header:
                raise DataError(f"{name}:{line}: no readable header ({fault}). Change the file.") from None
            yield line, Unparsed("bad_csv", str(fault), ""), 0
            continue
        size = sum(map(len, fields))
        if long_lines:
            long_lines.clear()
            yield (
                line,
                Unparsed("long_line", f"a line is longer than {json_text.MAX_BYTES >> 20} MiB", "".join(fields)[:200]),
                size,
            )
        elif not fields:
            continue
        elif not header:
            header = fields
            if len(set(header)) != len(header):
                raise DataError(f"{name}:{line}: a column name stands twice: {', '.join(header)}. Rename one.")
        elif len(fields) != len(header):
            reason = f"{len(fields)} fields, the header has {len(header)}"
            yield line, Unparsed("bad_csv", reason, json.dumps(fields)), size
        elif any("\udc80" <= letter <= "\udcff" for field in fields for letter in _not_ascii(field)):
            yield line, Unparsed("bad_utf8", "the row is no UTF-8", json.dumps(fields)), size
        else:
            yield line, dict(zip(header, fields, strict=True)), size


def _not_ascii(text: str) -> str:
    return "" if text.isascii() else text


def _lines(file: io.TextIOWrapper, long_lines: list[int]) -> Iterator[str]:
    """The lines of a file; of one that is too long its number is noted, and an empty line stands for it."""
    number = 0
    while line := file.readline(json_text.MAX_BYTES):
        number += 1
        if len(line) == json_text.MAX_BYTES and not line.endswith(("\n", "\r")):
            long_lines.append(number)
            while (rest := file.readline(json_text.MAX_BYTES)) and not rest.endswith(("\n", "\r")):
                pass
            line = "\n"
        yield line


def parquet_batches(path: Path, name: str, key: str) -> Iterator[pa.RecordBatch]:
    """Batches of at most ROWS."""
    try:
        with pq.ParquetFile(path) as table:
            _check_names(table.schema_arrow, name)
            yield from table.iter_batches(batch_size=ROWS)
    except (pa.ArrowException, OSError, ValueError) as fault:
        raise _unreadable(name, "Parquet", key, fault) from None


def arrow_batches(path: Path, name: str, key: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file or stream, none larger than ROWS, each checked: its bytes are taken as they are."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(file)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            else:
                file.seek(max(file.size() - len(END_OF_STREAM), 0))
                if file.read() != END_OF_STREAM:
                    raise DataError(f"{name}: has no end-of-stream mark: it seems cut short. Write the file again.")
                file.seek(0)
                opened = pa.ipc.open_stream(file)
                batches = iter(opened)
            _check_names(opened.schema, name)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ROWS):
                    yield batch if batch.num_rows <= ROWS else _copied(batch.slice(start, ROWS))
    except (pa.ArrowException, OSError, ValueError) as fault:
        raise _unreadable(name, "Arrow", key, fault) from None


def _copied(part: pa.RecordBatch) -> pa.RecordBatch:
    """A slice with memory of its own: pickle would send all of the batch that it is cut from."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.schema) as writer:
        writer.write_batch(part)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def _check_names(schema: pa.Schema, name: str) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise DataError(f"{name}: a column name stands twice: {', '.join(schema.names)}. Rename one.")


def _unreadable(name: str, kind: str, key: str, fault: Exception) -> DataError:
    reason = " ".join(str(fault).split())[:200]
    return DataError(f"{name}: no readable {kind} file ({reason}). Write the file again, or change {key}.")


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Unparsed]:
    """Each row of a batch; one with a value that Python cannot hold is told apart from its neighbours."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, pa.ArrowException):  # of some row: bytes that are no UTF-8, a date past 9999
        pass
    for number in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            for column in batch.schema.names:
                row[column] = batch.column(column)[number].as_py()
        except UnicodeDecodeError:
            yield Unparsed("bad_utf8", f"column {column} is no UTF-8", json.dumps(row, default=str))
        except (ValueError, OverflowError, pa.ArrowException) as fault:
            yield Unparsed("bad_value", f"column {column}: {fault}", json.dumps(row, default=str))
        else:
            yield row
