"""Exact and near duplicates: MinHash finds candidate pairs, their exact Jaccard similarity decides.

Two rows are compared by the set of their word shingles, without the wording that most rows of their task share.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Generic, TypeVar

import numpy as np
from rensa import RMinHash

from stages.lib.schema.dedup import Dedup

T = TypeVar("T", int, str)
Row = Mapping[str, Any]
Shingles = frozenset[int]  # 64-bit hashes of word n-grams

MINHASH_SEED = 1  # of the candidate search alone: what is a duplicate does not depend on it
MIN_ROWS_FOR_A_TEMPLATE = 10  # of a task: with fewer, "most rows" says nothing
_WORD = re.compile(  # scripts without blanks: one character, one word; signs that change what is said; no punctuation
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[-+*/=<>^%&|~@]"
)


@dataclass(frozen=True)
class Dropped:
    """A row that is left out: which kept row it repeats (by id), how similar they are, in which cluster, and why."""

    id: str
    kept_id: str | None
    score: float | None
    cluster: str
    reason: str
    task: str
    source: str

    @classmethod
    def of(
        cls,
        row: Row,
        clusters: Mapping[str, str],
        reason: str,
        kept_id: str | None = None,
        score: float | None = None,
    ) -> "Dropped":
        return cls(row["id"], kept_id, score, clusters[row["id"]], reason, row["task"], row["source"])


@dataclass(frozen=True)
class Deduplicated:
    kept: list[Row]  # by id
    dropped: list[Dropped]  # by id
    clusters: dict[str, str]  # id of every row -> the smallest id of its cluster
    shingles: dict[str, Shingles]  # id of every kept row -> what it was compared by
    candidates: int  # pairs that MinHash proposed and Jaccard judged


def near_duplicates(rows: Sequence[Row], settings: Dedup) -> Deduplicated:
    """Keep one row of every group of mutual duplicates.

        a ~ b, b ~ c, a !~ c  ->  a and c are kept, b is dropped for a; all three are one cluster

    Rows are taken in the order of their ids, so the result does not depend on the order of the input. A row is dropped
    only for a kept row it was itself compared with; clusters follow chains of such pairs.
    """
    ordered = sorted(rows, key=lambda row: (row["id"], row["group"], row["source"], row["meta"]))
    distinct, repeats = _without_exact(ordered)
    compared = shingles(distinct, settings)
    ids = [row["id"] for row in distinct]
    similar: dict[int, dict[int, float]] = defaultdict(dict)
    candidates = candidate_pairs(compared, settings)
    for left, right in candidates:
        if (score := jaccard(compared[left], compared[right])) >= settings.threshold:
            similar[left][right] = similar[right][left] = score
    root = _clusters(len(distinct), similar)
    clusters = {ids[number]: ids[root[number]] for number in range(len(distinct))}

    kept_numbers: set[int] = set()
    dropped = []
    for number, row in enumerate(distinct):
        repeated = [(-score, other) for other, score in similar[number].items() if other in kept_numbers]
        if not repeated:
            kept_numbers.add(number)
            continue
        score, other = min(repeated)
        dropped.append(Dropped.of(row, clusters, "near", ids[other], -score))
    replaced = {row.id: row.kept_id for row in dropped}
    for row, first in repeats:
        clusters[row["id"]] = clusters[first]
        dropped.append(Dropped.of(row, clusters, "exact", replaced.get(first, first), 1.0))
    return Deduplicated(
        kept=[distinct[number] for number in sorted(kept_numbers)],
        dropped=sorted(dropped, key=lambda row: (row.id, row.reason)),
        clusters=clusters,
        shingles={ids[number]: compared[number] for number in sorted(kept_numbers)},
        candidates=len(candidates),
    )


def _without_exact(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[Row, str]]]:
    """(rows with different words, [(row, id of the first row with the same words)])."""
    first: dict[str, str] = {}
    distinct: list[Row] = []
    repeats: list[tuple[Row, str]] = []
    for row in rows:
        content = " ".join(words(text(row))) or text(row)
        if content in first:
            repeats.append((row, first[content]))
        else:
            first[content] = row["id"]
            distinct.append(row)
    return distinct, repeats


def text(row: Row) -> str:
    """What is compared of a conversation: all turns but the system's, which many rows share."""
    return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] != "system")


def words(text: str) -> list[str]:
    """Words without case and punctuation, signs kept: "Axis : int, A+B" -> [axis, int, a, +, b]."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(rows: Sequence[Row], settings: Dedup) -> list[Shingles]:
    """The word n-grams of each row without those that more than `shared_fraction` of its task's rows have.

    A row of nothing but shared wording keeps all of its own, else it would equal every other such row.
    """
    whole = [_ngrams(text(row), settings.shingle_words) for row in rows]
    size = Counter(row["task"] for row in rows)
    holding: dict[str, Counter[int]] = defaultdict(Counter)
    for row, grams in zip(rows, whole, strict=True):
        holding[row["task"]].update(grams)
    shared = {
        task: {gram for gram, count in holding[task].items() if count > settings.shared_fraction * total}
        for task, total in size.items()
        if total >= MIN_ROWS_FOR_A_TEMPLATE
    }
    return [frozenset(grams - shared.get(row["task"], set()) or grams) for row, grams in zip(rows, whole, strict=True)]


def _ngrams(content: str, length: int) -> set[int]:
    """Hashes of all runs of `length` words; of the whole, when it has fewer words."""
    found = words(content) or [content]
    runs = {" ".join(found[start : start + length]) for start in range(max(1, len(found) - length + 1))}
    return {int.from_bytes(hashlib.blake2b(run.encode("utf-8"), digest_size=8).digest()) for run in runs}


def jaccard(left: Shingles, right: Shingles) -> float:
    """|left & right| / |left | right|."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)


def candidate_pairs(compared: Sequence[Shingles], settings: Dedup) -> list[tuple[int, int]]:
    """Positions of pairs whose MinHash signatures agree in at least one band, sorted.

    With b bands of r rows a pair of similarity s is found with probability 1 - (1 - s^r)^b.
    """
    if not compared:
        return []
    matrix = RMinHash.digest_matrix_from_token_hash_sets(
        [sorted(grams) for grams in compared], settings.num_perm, MINHASH_SEED
    )
    signatures = np.array(matrix.to_rows(), dtype=np.uint32)  # (rows, num_perm)
    width = settings.num_perm // settings.bands
    pairs: set[tuple[int, int]] = set()
    for start in range(0, settings.num_perm, width):
        bucket: dict[bytes, list[int]] = defaultdict(list)
        for number, band in enumerate(signatures[:, start : start + width]):
            bucket[band.tobytes()].append(number)
        for members in bucket.values():
            pairs.update(combinations(members, 2))
    return sorted(pairs)


def _clusters(size: int, similar: Mapping[int, Mapping[int, float]]) -> list[int]:
    """The smallest member of each position's cluster."""
    roots = Roots(range(size))
    for left, others in similar.items():
        for right in others:
            roots.join(left, right)
    return [roots.of(number) for number in range(size)]


class Roots(Generic[T]):
    """Union-find: which things hang together, each set named by its smallest member."""

    def __init__(self, members: Iterable[T]) -> None:
        self._parent: dict[T, T] = {member: member for member in members}

    def of(self, member: T) -> T:
        while (parent := self._parent[member]) != member:
            self._parent[member] = self._parent[parent]
            member = self._parent[member]
        return member

    def join(self, left: T, right: T) -> None:
        smaller, larger = sorted((self.of(left), self.of(right)))
        self._parent[larger] = smaller


def similar_across(
    left: Mapping[str, Shingles], right: Mapping[str, Shingles], threshold: float
) -> Iterator[tuple[str, str, float]]:
    """(left id, right id, Jaccard) of every pair at or above the threshold: exact, nothing is estimated.

    Two sets that similar share a shingle among the rarest |set| - ceil(threshold * |set|) + 1 of each, so only pairs
    that meet there are compared (prefix filtering, Bayardo et al. 2007, "Scaling up all pairs similarity search").
    0.55 * 100 is a little above 55 in floating point: without the 1e-9 the prefix would be one shingle short.
    """
    frequency = Counter(gram for grams in (*left.values(), *right.values()) for gram in grams)

    def prefix(grams: Shingles) -> list[int]:
        rarest = sorted(grams, key=lambda gram: (frequency[gram], gram))
        return rarest[: len(grams) - math.ceil(threshold * len(grams) - 1e-9) + 1]

    holding: dict[int, list[str]] = defaultdict(list)
    for id, grams in right.items():
        for gram in prefix(grams):
            holding[gram].append(id)
    for id, grams in left.items():
        met = {other for gram in prefix(grams) for other in holding.get(gram, ())}
        for other in sorted(met):
            if (score := jaccard(grams, right[other])) >= threshold:
                yield id, other, score
