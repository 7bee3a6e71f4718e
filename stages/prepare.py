"""Stage prepare: read the data, check every row, keep what is rejected with its reason.

Writes data/prepared (records as Parquet shards, rejected.jsonl) and metrics/prepare.json.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib import engine, files, records, stage, tracking
from stages.lib.errors import DataError
from stages.lib.rows import Rejection
from stages.lib.schema.data import Data, Source
from stages.lib.sources import hub, local_file, python_docs

ROWS_PER_SHARD = 50_000


@dataclasses.dataclass
class Params:
    data: Data


def main(p: Params) -> None:
    rows: list[dict[str, Any]] = []
    rejected: list[Rejection] = []
    for row in read(p.data):
        rejected.append(row) if isinstance(row, Rejection) else rows.append(row)
    if not rows:
        raise DataError(nothing_usable(p.data, rejected))
    with files.replacing(Path("data/prepared")) as folder:
        for number, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
            shard = rows[start : start + ROWS_PER_SHARD]
            files.write_rows(folder / f"rows-{number:05d}.parquet", shard, records.RECORD)
        files.write_jsonl(folder / "rejected.jsonl", [dataclasses.asdict(row) for row in rejected])
    tracking.report("prepare", metrics(rows, rejected))


def read(data: Data) -> Iterator[dict[str, Any] | Rejection]:
    """Every row of the configured source, as a record or as a rejection, in the order of the source."""
    if data.source is Source.python_docs:
        yield from python_docs.rows(data.packages, data.max_chars)
    elif data.source is Source.local:
        path = Path(data.path)
        yield from local_file.records_of(path, data.format, data.columns, data.max_chars, name=path.name)
    else:
        id, revision = data.pinned()
        with tempfile.TemporaryDirectory() as folder:
            for copy in hub.fetch_data(id, revision, data.split, Path(folder)):
                name = copy.relative_to(folder).as_posix()
                yield from local_file.records_of(copy, data.format, data.columns, data.max_chars, name=name)


def nothing_usable(data: Data, rejected: list[Rejection]) -> str:
    """The message for a source without one usable row: the first rejections, and what can be changed."""
    place = {Source.local: data.path, Source.hub: data.id, Source.python_docs: ", ".join(data.packages)}[data.source]
    if not rejected:
        return f"{place}: holds no row. Change data.path."
    first = "".join(f"\n  {row.where}: {row.code}: {row.reason}" for row in rejected[:5])
    return (
        f"{place}: none of {len(rejected)} rows can be used, expected conversations that end with an answer."
        f"{first}\nMend the rows, or change data.format, data.columns or data.path."
    )


def metrics(rows: list[dict[str, Any]], rejected: list[Rejection]) -> dict[str, float]:
    """rows/in = rows/out + rejected; by task and by reason."""
    tasks = Counter(row["task"] for row in rows)
    codes = Counter(row.code for row in rejected)
    return {
        "rows/in": len(rows) + len(rejected),
        "rows/out": len(rows),
        "rows/rejected": len(rejected),
        **{f"rows/out/{task}": count for task, count in tasks.items()},
        **{f"rejected/{code}": count for code, count in codes.items()},
    }


if __name__ == "__main__":
    stage.run("prepare", main, Params, start=engine.start)
