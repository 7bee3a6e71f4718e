"""All sources of the data, cut into blocks that are parsed and checked by themselves, each row with its place."""

import bz2
import gzip
import io
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from stages.lib.errors import DataError
from stages.lib.rows import Unfit, Unparsed
from stages.lib.schema.data import Data, Source
from stages.lib.sources import hub, json_text, places, python_docs, tables, url

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 1024
HEAD_BYTES = 64 << 10
MARK = b"\xef\xbb\xbf"  # of byte order, before UTF-8

MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"FEA1": "feather version 1",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    **{b"BZh%d%b" % (level, block): "bzip2" for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")},
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF": "pdf",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xd0\xcf\x11\xe0": "Office",
    b"SQLite format 3\x00": "SQLite",
}
_OLD_LINE_END = re.compile(rb"\}\s*\r\s*\{")

Numbered = tuple[int, Any, int]  # line or row, a row or an item's text or the Unparsed that reading met, size in bytes


@dataclass(frozen=True)
class Block:
    """A piece of a source, of bounded size. Where a source is cut depends on its files alone."""

    source: str  # key in data.sources, "" for a single source
    name: str  # the file, as messages and records name it
    first: int  # number of its first line (text) or row (tables)
    content: bytes | list[tuple[str, Any]] | pa.RecordBatch
    """Whole lines of JSON; or (where, row), the row possibly still an item's text; or a piece of a table."""


def blocks(data: Data) -> Iterator[Block]:
    """All sources of the data, those of `data.sources` by name, their files by name, in bounded memory.

    Raises: DataError, when a file is missing, empty, cut short or of another kind than its name says; ExternalError,
        when the hub or an address does not give what is asked of it; ConfigError, when a path leaves its folder.
    """
    for source, settings in data.each().items():
        if settings.source is Source.python_docs:
            found = python_docs.rows(settings.packages, settings.max_chars)
            for first, part in _parts((number, pair, 0) for number, pair in enumerate(found, start=1)):
                yield Block(source, "python_docs", first, [pair for _, pair in part])
            continue
        for path, name, key in _files(data, source, settings):
            yield from file_blocks(path, name, source, key=key)


def _files(data: Data, source: str, settings: Data) -> Iterator[tuple[Path, str, str]]:
    """(file, name, the key that chose it) of a source of files."""
    section = f"data.sources.{source}" if source else "data"
    if settings.source is Source.hub:
        id, revision = settings.pinned()
        for path, name in hub.fetch_data(id, revision, settings.split):
            yield path, name, f"{section}.id"
    elif settings.source is Source.url:
        assert settings.url is not None
        assert settings.sha256 is not None
        yield url.fetch(settings.url, settings.sha256), url.name(settings.url), f"{section}.url"
    else:
        key, inside = places.origin(data, source)
        for path, name in places.files(settings.path, key=key, inside=inside):
            yield path, name, key


def file_blocks(path: Path, name: str, source: str = "", *, key: str = "data.path") -> Iterator[Block]:
    """The blocks of one file, whose name says how to read it.

    Raises: DataError, when it is empty, of another kind than its name says, or cut short.
    """
    kind, compression = _checked_kind(path, name, key)
    try:
        if kind in ("parquet", "arrow"):
            batches = tables.parquet_batches if kind == "parquet" else tables.arrow_batches
            first = 1
            with _plain(path, compression) as plain:
                for batch in batches(plain, name, key):
                    yield Block(source, name, first, batch)
                    first += batch.num_rows
            return
        with _unpacked(path, compression) as stream:
            if kind == "jsonl":
                yield from _lines(stream, source, name)
                return
            rows = _text(stream) if kind == "txt" else _items(stream, name)
            if kind in ("csv", "tsv"):
                rows = tables.text_rows(stream, name, "," if kind == "csv" else "\t")
            for first, part in _parts(rows):
                yield Block(source, name, first, [(f"{name}:{number}", row) for number, row in part])
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as fault:
        if not compression or (isinstance(fault, OSError) and fault.errno):
            raise
        raise DataError(
            f"{name}: the {compression} data in it are broken or cut short ({fault}). Copy the file again, or change "
            f"{key}."
        ) from None


def parsed(block: Block) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) for each row of a block; the row is a mapping, or the Unparsed that tells why there is none.

    Raises: DataError, when an item of a JSON list is no JSON: where the next one begins is then uncertain.
    """
    if isinstance(block.content, bytes):
        for number, line in enumerate(block.content.split(b"\n"), start=block.first):
            if (row := _row_of_line(line)) is not None:
                yield f"{block.name}:{number}", row
    elif isinstance(block.content, pa.RecordBatch):
        for number, row in enumerate(tables.batch_rows(block.content), start=block.first):
            yield f"{block.name}:{number}", row
    else:
        for where, row in block.content:
            yield where, _row_of_item(row, where) if isinstance(row, bytes) else row


def _row_of_line(line: bytes) -> Any:
    """The row of a line of JSON, None for an empty line."""
    if len(line) > json_text.MAX_BYTES:
        return _long_line(line)
    try:
        return _mapping(json_text.value(line), line)
    except Unfit as unfit:
        return Unparsed(unfit.code, unfit.reason, _shown(line)) if line.strip() else None


def _row_of_item(text: bytes, where: str) -> Any:
    try:
        return _mapping(json_text.value(text), text)
    except json_text.BadSyntax as fault:
        raise DataError(f"{where}: no JSON ({fault.reason}). Mend it, or write one object per line (.jsonl).") from None
    except Unfit as unfit:
        return Unparsed(unfit.code, unfit.reason, _shown(text))


def _mapping(row: Any, text: bytes) -> Any:
    if type(row) is dict:
        return row
    reason = f"the row is a {type(row).__name__}, expected an object with named fields"
    return Unparsed("no_object", reason, _shown(text))


def _long_line(start: bytes) -> Unparsed:
    return Unparsed("long_line", f"the line is longer than {json_text.MAX_BYTES >> 20} MiB", _shown(start[:200]))


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")


def _checked_kind(path: Path, name: str, key: str) -> tuple[str, str | None]:
    """(kind, compression) of a file, after a look into it."""
    named = places.kind(name)
    if named is None:
        suffix = Path(name).suffix or "nameless"
        raise DataError(f"{name}: found a {suffix} file, expected {places.EXPECTED}. Change {key}.")
    kind, compression = named
    with path.open("rb") as file:
        held = _held(start := file.read(HEAD_BYTES))
    if compression and held == compression:
        with _unpacked(path, compression) as stream:
            try:
                start = stream.read(HEAD_BYTES)
            except (EOFError, OSError, zlib.error, lzma.LZMAError):
                return kind, compression  # told when it is read
        held = _held(start)
    elif compression:
        raise DataError(
            f"{name}: found {held or 'no'} data in it, expected {compression}, as its name says. Change {key}."
        )
    if len(start) < HEAD_BYTES and not start.removeprefix(MARK).strip():
        raise DataError(f"{name}: is empty, expected rows. Change {key}.")
    if held != (kind if kind in ("parquet", "arrow") else None):
        raise DataError(f"{name}: found {held or 'no'} data in it, expected {kind}, as its name says. Change {key}.")
    if kind == "json" and start.removeprefix(MARK).lstrip()[:1] == b"{":
        kind = "jsonl"
    if kind == "jsonl":
        _check_lines(start.removeprefix(MARK), name)
    return kind, compression


def _held(start: bytes) -> str | None:
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


@contextmanager
def _plain(path: Path, compression: str | None) -> Iterator[Path]:
    """The file unpacked, for readers that go back and forth in it."""
    if compression is None:
        yield path
        return
    with tempfile.NamedTemporaryFile() as plain:
        with _unpacked(path, compression) as stream:
            shutil.copyfileobj(stream, plain, 1 << 20)
        plain.flush()
        yield Path(plain.name)


@contextmanager
def _unpacked(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    """The content of a file.

    Every reader here raises at a file that is cut short; zstandard's would end quietly, hence Arrow's for zstd.
    """
    if compression == "zstd":
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
    else:
        readers: dict[str | None, Any] = {None: open, "gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        with readers[compression](path, "rb") as stream:
            yield stream


def _lines(stream: BinaryIO, source: str, name: str) -> Iterator[Block]:
    """Blocks of whole lines, about BLOCK_BYTES each; a line too long to be held is a block of one rejection."""
    first, held, is_skipping, is_last = 1, stream.read(len(MARK)).removeprefix(MARK), False, False
    while not is_last:
        chunk = stream.read(BLOCK_BYTES)
        is_last = len(chunk) < BLOCK_BYTES
        if is_skipping:  # to the end of a line that is too long
            _, line_end, chunk = chunk.partition(b"\n")
            if not line_end:
                continue
            is_skipping = False
        end = len(chunk) if is_last else chunk.rfind(b"\n") + 1
        if end:
            if content := held + chunk[:end]:
                yield Block(source, name, first, content)
            first, held = first + content.count(b"\n"), b""
        held += chunk[end:]
        if len(held) > json_text.MAX_BYTES:
            yield Block(source, name, first, [(f"{name}:{first}", _long_line(held))])
            first, held, is_skipping = first + 1, b"", True
    if held:
        yield Block(source, name, first, held)


def _check_lines(start: bytes, name: str) -> None:
    """Refuse what is JSON but in no lines, or in lines of another kind."""
    if (line := start.lstrip().partition(b"\n")[0].strip()) in (b"{", b"["):
        what = "an object" if line == b"{" else "a list"
        raise DataError(
            f"{name}: is {what} over several lines, expected one object per line. Write a list of objects to a .json "
            "file, or each object into one line of a .jsonl file."
        )
    if b"\n" not in start and _OLD_LINE_END.search(start):
        raise DataError(f"{name}: its lines end in CR alone, expected LF or CR LF. Convert the file.")


def _items(stream: BinaryIO, name: str) -> Iterator[Numbered]:
    """Items of a JSON list, their text unread."""
    try:
        for line, text in json_text.items(stream):
            yield line, _long_line(b"") if text is None else text, len(text or b"")
    except json_text.NoList as fault:
        raise DataError(f"{name}:{fault.line}: {fault.reason}. Mend the file, or write JSON Lines (.jsonl).") from None


def _text(stream: BinaryIO) -> Iterator[Numbered]:
    """The one record of a plain text."""
    content = stream.read(json_text.MAX_BYTES + 1)
    if len(content) > json_text.MAX_BYTES:
        yield (
            1,
            Unparsed("too_long", f"the file is longer than {json_text.MAX_BYTES >> 20} MiB", _shown(content[:200])),
            0,
        )
        return
    try:
        yield 1, {"text": content.decode("utf-8-sig")}, len(content)
    except UnicodeDecodeError as fault:
        yield 1, Unparsed("bad_utf8", f"byte {fault.start + 1} of the file is no UTF-8", _shown(content[:2000])), 0


def _parts(rows: Iterable[Numbered]) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    """(number of the first row, rows with their numbers), about BLOCK_BYTES or BLOCK_ROWS together."""
    part: list[tuple[int, Any]] = []
    total = 0
    for number, row, size in rows:
        part.append((number, row))
        total += size
        if total >= BLOCK_BYTES or len(part) >= BLOCK_ROWS:
            yield part[0][0], part
            part, total = [], 0
    if part:
        yield part[0][0], part
