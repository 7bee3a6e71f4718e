"""Reading and writing: equal content gives equal bytes, and nothing half-written is left in place."""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; put it in place only when the block ends well.

    with replacing(Path("data/splits")) as new:   # new = data/splits.partial, an absent path
        new.mkdir(); ...                          # an exception removes it, data/splits stays as it was

    A file is replaced in one step, a folder in two.
    """
    new = path.with_name(path.name + ".partial")
    _remove(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        old = path.with_name(path.name + ".old")
        _remove(old)
        if new.is_dir() and path.exists():
            path.rename(old)
        new.replace(path)
        _remove(old)
    finally:
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file, or of a folder of Parquet shards in the order of their names."""
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file, in the order given; the bytes depend on rows and schema alone."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as one Parquet file."""
    with replacing(path) as new:
        pq.write_table(table, new, compression="zstd")


class Buckets:
    """Rows on their way into one file sorted by id, when more come than fit in memory.

        ids 0...  ->  bucket 0      each takes the rows of one range of ids, in any order, and is sorted by itself
        ids 4...  ->  bucket 1      when it is read: what is written follows from the rows alone

    Rows need a column `id` of hex digits, equally spread as a hash's are.
    """

    def __init__(self, folder: Path, schema: pa.Schema, count: int) -> None:
        """Args: folder: an absent one, for the buckets alone. count: of buckets; it must follow from the rows alone."""
        self._paths = [folder / f"{number:05d}.arrow" for number in range(count)]
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._schema = schema
        folder.mkdir()

    def add(self, rows: pa.RecordBatch) -> None:
        count = len(self._paths)
        numbers = np.array([int(id[:8], 16) * count >> 32 for id in rows["id"].to_pylist()], np.int64)
        for number in np.unique(numbers).tolist():
            if number not in self._writers:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                self._writers[number] = pa.ipc.new_stream(self._paths[number], self._schema, options=options)
            self._writers[number].write(rows.filter(pa.array(numbers == number)))

    def __len__(self) -> int:
        return len(self._paths)

    def table(self, number: int) -> pa.Table:
        """The rows of one bucket, by id. Nothing can be added to it any more."""
        if number not in self._writers:
            return self._schema.empty_table()
        self._writers[number].close()
        with pa.ipc.open_stream(self._paths[number]) as stream:
            return stream.read_all().combine_chunks().sort_by("id")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, one final newline. NaN and infinity are refused: no reader agrees on them."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns as in the first row; a row with other columns is an error of ours."""
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
