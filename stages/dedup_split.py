"""Stage dedup_split: drop duplicates and near-duplicates, then split so that what hangs together stays together.

Reads data/prepared; writes data/splits (one Parquet file a split, dropped.parquet, linked.parquet) and
metrics/dedup_split.json.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.lib import dedup, engine, files, records, splits, stage, tracking
from stages.lib.dedup import Deduplicated, Dropped
from stages.lib.schema.dedup import Dedup
from stages.lib.schema.split import Split
from stages.lib.splits import Placed

DROPPED = pa.schema(
    [
        ("id", pa.string()),
        ("kept_id", pa.string()),
        ("score", pa.float64()),
        ("cluster", pa.string()),
        ("reason", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
    ]
)
LINKED = pa.schema([(name, pa.string()) for name in ("id", "group", "split", "alone", "with_group")])


@dataclass
class Params:
    dedup: Dedup
    split: Split


def main(p: Params) -> None:
    rows = files.read_rows(Path("data/prepared"))
    distinct = dedup.near_duplicates(rows, p.dedup)
    placed = splits.by_component(distinct.kept, distinct.clusters, p.split, p.split.seed)
    parts, leaks = splits.without_leaks(placed.parts, distinct.shingles, p.dedup.threshold)
    parts, beyond = splits.limit(parts, p.split.max_rows, p.split.seed)
    dropped = [
        *distinct.dropped,
        *(Dropped.of(leak.row, distinct.clusters, "joined", leak.kept_id, leak.score) for leak in leaks),
        *(Dropped.of(row, distinct.clusters, "limit") for row in beyond),
    ]
    with files.replacing(Path("data/splits")) as folder:
        for split, part in parts.items():
            files.write_rows(folder / f"{split}.parquet", part, records.RECORD)
        ordered = sorted(dropped, key=lambda row: (row.id, row.reason))
        files.write_rows(folder / "dropped.parquet", [asdict(row) for row in ordered], DROPPED)
        files.write_rows(folder / "linked.parquet", [asdict(row) for row in placed.linked], LINKED)
    tracking.report("dedup_split", metrics(rows, parts, dropped, distinct, placed))


def metrics(
    rows: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Sequence[Mapping[str, Any]]],
    dropped: Sequence[Dropped],
    distinct: Deduplicated,
    placed: Placed,
) -> dict[str, float]:
    """rows/in = rows/train + rows/validation + rows/test + rows/dropped, and rows/dropped = the four reasons."""
    reasons = Counter(row.reason for row in dropped)
    tasks = {split: Counter(row["task"] for row in part) for split, part in parts.items()}
    repeated = Counter(row.source for row in dropped if row.reason in ("exact", "near"))
    return {
        "rows/in": len(rows),
        "rows/dropped": len(dropped),
        **{f"rows/{split}": len(part) for split, part in parts.items()},
        **{f"rows/{split}/{task}": n for split, counted in tasks.items() for task, n in sorted(counted.items())},
        "duplicates/exact": reasons["exact"],
        "duplicates/near": reasons["near"],
        "duplicates/joined": reasons["joined"],
        **{f"duplicates/{source}": n for source, n in sorted(repeated.items())},
        "duplicates/candidate_pairs": distinct.candidates,
        "dropped/limit": reasons["limit"],
        "split/components": placed.components,
        "split/largest_component": placed.largest_component,
        "split/linked_rows": len(placed.linked),
    }


if __name__ == "__main__":
    stage.run("dedup_split", main, Params, start=engine.start)
