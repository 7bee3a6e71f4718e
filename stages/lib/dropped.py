"""What dedup_split leaves out: each row with the reason, and which row it gave way to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.lib import files
from stages.lib.contamination import Hit
from stages.lib.dedup import Deduplicated, Facts
from stages.lib.ngrams import Ints

SCHEMA = pa.schema(
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
EXAMPLES = 20  # pairs of duplicates that the data report shows
EXCERPT = 400  # characters of each
BEFORE = 80  # of them before the first difference


def table(
    facts: Facts,
    rows: Ints,
    cluster: Ints,
    reason: Any,
    kept_id: pa.Array | None = None,
    score: npt.NDArray[np.float64] | None = None,
) -> pa.Table:
    """Rows of the facts that are left out; without kept_id and score where no other row is why.

    Args: cluster: of every row of the facts, the row that names it. reason: one for all, or one each.
    """
    taken = facts.take(rows)
    reasons = pa.array(np.broadcast_to(np.asarray(reason), len(rows)).tolist(), pa.string())
    names = facts.id.take(pa.array(cluster[rows]))
    ids = pa.nulls(len(rows), pa.string()) if kept_id is None else kept_id
    scores = pa.nulls(len(rows), pa.float64()) if score is None else pa.array(score)
    return pa.table([taken.id, ids, scores, names, reasons, taken.task, taken.source], schema=SCHEMA)


def duplicates(facts: Facts, found: Deduplicated) -> pa.Table:
    """The rows that repeat another."""
    kept_id = facts.id.take(pa.array(found.repeats))
    return table(facts, found.dropped, found.cluster, found.reason, kept_id, found.score)


def contaminated(facts: Facts, kept: Ints, cluster: Ints, hits: Sequence[Hit]) -> pa.Table:
    """The training rows that contain a held-out one, each with the one it contains most of; kept: rows with a place."""
    closest: dict[str, Hit] = {}
    for hit in sorted(hits, key=lambda hit: (hit.id, -hit.share, hit.where, hit.overlaps)):
        closest.setdefault(hit.id, hit)
    ids = facts.id.take(pa.array(kept))
    place = pc.index_in(pa.array(list(closest), pa.string()), value_set=ids)
    found = [
        (number, hit) for number, hit in zip(place.to_pylist(), closest.values(), strict=True) if number is not None
    ]
    rows = kept[np.array([number for number, _ in found], np.int64)]
    overlaps = pa.array([hit.overlaps for _, hit in found], pa.string())
    share = np.array([hit.share for _, hit in found], np.float64)
    return table(facts, rows, cluster, "contaminated", overlaps, share)


def by_id(parts: list[pa.Table]) -> pa.Table:
    """All of them, in an order that follows from the rows alone."""
    order = [(name, "ascending") for name in ("id", "reason", "source", "task", "kept_id")]
    return pa.concat_tables(parts).combine_chunks().sort_by(order)


def examples(facts: Facts, found: Deduplicated) -> Ints:
    """Up to EXAMPLES of the dropped, by their place there: nearly equal ones before exact ones, then by id."""
    order = pa.table({"exact": found.reason == "exact", "id": facts.id.take(pa.array(found.dropped))})
    chosen = pc.sort_indices(order, [("exact", "ascending"), ("id", "ascending")])
    return chosen[:EXAMPLES].to_numpy().astype(np.int64)


def write_examples(path: Path, facts: Facts, found: Deduplicated, chosen: Ints, texts: Mapping[int, str]) -> None:
    """One line a pair: both ids, score, reason and source, and both texts from shortly before they part.

    Args: texts: of the rows of the pairs, by their numbers.
    """
    lines = []
    for number in chosen.tolist():
        row, kept = int(found.dropped[number]), int(found.repeats[number])
        dropped_text, kept_text = excerpts(texts[row], texts[kept])
        lines.append(
            {
                "id": facts.id[row].as_py(),
                "kept_id": facts.id[kept].as_py(),
                "score": round(float(found.score[number]), 6),
                "reason": str(found.reason[number]),
                "source": facts.source[row].as_py(),
                "text": dropped_text,
                "kept_text": kept_text,
            }
        )
    files.write_jsonl(path, lines)


def excerpts(one: str, other: str) -> tuple[str, str]:
    """Two texts shortened to EXCERPT characters, from shortly before the first character in which they differ."""
    shorter = min(len(one), len(other))
    parts = next((place for place in range(shorter) if one[place] != other[place]), shorter)
    begin = max(0, min(parts - BEFORE, max(len(one), len(other)) - EXCERPT))
    return _excerpt(one, begin), _excerpt(other, begin)


def _excerpt(text: str, begin: int) -> str:
    return ("…" if begin else "") + text[begin : begin + EXCERPT] + ("…" if len(text) > begin + EXCERPT else "")
