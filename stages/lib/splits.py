"""Train, validation and test: rows that hang together stay together, and stay where they are when rows are added."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.dedup import Roots, Shingles, similar_across
from stages.lib.errors import DataError
from stages.lib.schema.split import SPLITS, Split

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Linked:
    """A row that stands elsewhere than its own group alone would: rows of other groups, similar to its own, pull it."""

    id: str
    group: str
    split: str
    alone: str
    with_group: str


@dataclass(frozen=True)
class Placed:
    parts: dict[str, list[Row]]  # split -> rows, by id
    linked: list[Linked]
    components: int
    largest_component: int  # rows


@dataclass(frozen=True)
class Leak:
    """A row that is taken out of one split because a row of a split held out more strictly is nearly equal to it."""

    row: Row
    kept_id: str
    score: float


def by_component(rows: Sequence[Row], clusters: Mapping[str, str], settings: Split, seed: int) -> Placed:
    """Place each component of rows, linked by a common group or a common cluster of near-duplicates, in one split.

        group A: a1 a2      cluster {a2, b1}      ->  a1 a2 b1 are one component, c1 another
        group B: b1
        group C: c1

    The split follows from a hash of the seed and the name of the component's largest group: rows that come later move
    nothing, unless they tie two groups together.

    Args: clusters: id of each row -> name of its cluster.
    Raises: DataError, when a split stays empty.
    """
    name = {row["id"]: group_of(row) for row in rows}
    sizes = Counter(name.values())
    roots = Roots(sizes)
    first: dict[str, str] = {}
    for row in rows:
        other = first.setdefault(clusters[row["id"]], name[row["id"]])
        roots.join(other, name[row["id"]])
    members: dict[str, list[str]] = defaultdict(list)
    for group in sizes:
        members[roots.of(group)].append(group)
    leader = {root: min(groups, key=lambda group: (-sizes[group], group)) for root, groups in members.items()}

    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    linked = []
    for row in sorted(rows, key=lambda row: row["id"]):
        group = name[row["id"]]
        by = leader[roots.of(group)]
        split, alone = split_of(by, settings, seed), split_of(group, settings, seed)
        parts[split].append(row)
        if split != alone:
            linked.append(Linked(row["id"], group, split, alone, by))
    if empty := [split for split, part in parts.items() if not part]:
        raise DataError(
            f"{' and '.join(empty)}: no row; {len(rows)} rows form {len(members)} groups that must stay whole. "
            "Add rows, raise split.validation_fraction or split.test_fraction, or change split.seed."
        )
    largest = max(sum(sizes[group] for group in groups) for groups in members.values())
    return Placed(parts, linked, len(members), largest)


def group_of(row: Row) -> str:
    """The name of a row's group; a row without one is its own group."""
    return row["group"] or row["id"]


def split_of(group: str, settings: Split, seed: int) -> str:
    """The split of a group that hangs together with no other."""
    point = position(group, seed)
    if point < settings.test_fraction:
        return "test"
    return "validation" if point < settings.test_fraction + settings.validation_fraction else "train"


def position(name: str, seed: int) -> float:
    """A place in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def without_leaks(
    parts: Mapping[str, Sequence[Row]], shingles: Mapping[str, Shingles], threshold: float
) -> tuple[dict[str, list[Row]], list[Leak]]:
    """Take out of train what is nearly equal to a row of validation or test, and out of validation what is to test's.

    Candidates come from MinHash, which may overlook a pair; this join is exact, so that the promise is zero.

    Args: shingles: id -> what the row is compared by. threshold: Jaccard similarity from which two rows are too close.
    """
    clean = {split: list(part) for split, part in parts.items()}
    leaks = []
    for held_out, open_split in (("test", "validation"), ("test", "train"), ("validation", "train")):
        found: dict[str, tuple[float, str]] = {}
        pairs = similar_across(_of(clean[held_out], shingles), _of(clean[open_split], shingles), threshold)
        for kept_id, id, score in pairs:
            found[id] = max(found.get(id, (0.0, "")), (score, kept_id))
        leaks += [
            Leak(row, found[row["id"]][1], found[row["id"]][0]) for row in clean[open_split] if row["id"] in found
        ]
        clean[open_split] = [row for row in clean[open_split] if row["id"] not in found]
    return clean, leaks


def _of(rows: Sequence[Row], shingles: Mapping[str, Shingles]) -> dict[str, Shingles]:
    return {row["id"]: shingles[row["id"]] for row in rows}


def limit(
    parts: Mapping[str, Sequence[Row]], max_rows: Mapping[str, Mapping[str, int]], seed: int
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Keep at most max_rows[split][task] rows, those that a hash of seed and id puts first: a larger limit only adds.

    Returns: (the parts, what was left out).
    """
    limited: dict[str, list[Row]] = {}
    beyond: list[Row] = []
    for split, rows in parts.items():
        left = dict(max_rows.get(split, {}))
        kept = []
        for row in sorted(rows, key=lambda row: position(row["id"], seed)):
            remaining = left.get(row["task"])
            if remaining == 0:
                beyond.append(row)
                continue
            if remaining is not None:
                left[row["task"]] = remaining - 1
            kept.append(row)
        limited[split] = sorted(kept, key=lambda row: row["id"])
    return limited, sorted(beyond, key=lambda row: row["id"])
