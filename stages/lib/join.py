"""Pairs of sets at or above a Jaccard similarity: all of them, nothing is estimated.

Two sets that similar share an element among the rarest |set| - ceil(threshold * |set|) + 1 of each, their prefixes, so
only pairs that meet there are compared (prefix filtering, Bayardo et al. 2007, "Scaling up all pairs similarity
search").
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.lib.ngrams import Hashes, Ints, Ngrams, pieces, ranges, starts

PIECE = 2**22  # elements, or pairs, worked on at once: bounds the memory, changes no result
BLOCK = 2**14  # rows compared with the kept ones at once
SKETCH_WORDS = 4  # of 64 bits, a row's sketch


@dataclass(frozen=True)
class Pairs:
    """Rows left[i] and right[i] have the Jaccard similarity score[i]; sorted by left, then right."""

    left: Ints
    right: Ints
    score: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.left)


class Frequencies:
    """About how many sets hold an element: never less than there are, seldom more."""

    def __init__(self, sets: Ngrams) -> None:
        self._mask = np.uint64(2 ** int(np.clip(np.ceil(np.log2(len(sets.grams) + 1)), 10, 26)) - 1)
        self._counts = np.zeros(int(self._mask) + 1, np.uint32)
        for begin in range(0, len(sets.grams), PIECE):
            places = sets.grams[begin : begin + PIECE] & self._mask
            places.sort()
            first = np.flatnonzero(np.append(True, places[1:] != places[:-1]))
            self._counts[places[first]] += np.diff(np.append(first, len(places))).astype(np.uint32)

    def of(self, grams: Hashes) -> npt.NDArray[np.uint32]:
        return self._counts[grams & self._mask]


class Join:
    """Sets that are kept, found again by their prefixes.

    In which order the rarest come first is free as long as all sets follow it: here the estimated frequency, then the
    hash. Elements that stand in one prefix only lead to nobody and are left out.
    """

    def __init__(
        self,
        sets: Ngrams,
        threshold: float,
        frequencies: Frequencies | None = None,
        apart: npt.NDArray[np.int8] | None = None,
    ) -> None:
        """Args: apart: rows with equal marks above 0 are not compared with each other."""
        self._sets, self._threshold = sets, threshold
        self._sizes = sets.sizes
        self._apart = apart
        self._sketches = _sketches(sets)
        self._offsets, self._codes = _prefixes(sets, threshold, frequencies or Frequencies(sets))
        room = np.bincount(self._codes)
        self._begin = starts(room)[:-1]
        self._filled = np.zeros(len(room), np.int64)
        self._holders = np.empty(len(self._codes), np.int32)

    def add(self, rows: Ints) -> None:
        """Find these rows from now on."""
        owners, codes = self._entries(rows)
        order = np.argsort(codes, kind="stable")
        codes, owners = codes[order], owners[order]
        first, counts = _groups(codes)
        rank = np.arange(len(codes)) - np.repeat(first, counts)
        self._holders[self._begin[codes] + self._filled[codes] + rank] = owners
        self._filled[codes[first]] += counts

    def matches(self, rows: Ints) -> Pairs:
        """Every pair of one of these rows and an added one at or above the threshold."""
        owners, codes = self._entries(rows)
        return self._verified(self._met(owners, self._begin[codes], self._filled[codes], self._holders))

    def matches_among(self, rows: Ints) -> Pairs | None:
        """Every pair of these rows at or above the threshold, the later one left; None, when too many meet."""
        places, codes = self._entries(rows, np.arange(len(rows)))
        order = np.argsort(codes, kind="stable")
        places, codes = places[order], codes[order]
        first, counts = _groups(codes)
        begin = np.repeat(first, counts)
        earlier = np.arange(len(codes)) - begin
        if earlier.sum() > PIECE and len(rows) > 1:
            return None
        holders = rows[places]
        return self._verified(self._met(holders, begin, earlier, holders))

    def _entries(self, rows: Ints, names: Ints | None = None) -> tuple[Ints, npt.NDArray[np.int32]]:
        """(whose, code) of every element in the rows' prefixes."""
        sizes = self._offsets[rows + 1] - self._offsets[rows]
        return np.repeat(rows if names is None else names, sizes), self._codes[ranges(self._offsets[rows], sizes)]

    def _met(
        self, left: Ints, begin: Ints, counts: Ints, holders: npt.NDArray[np.integer]
    ) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of left[i] and each of holders[begin[i]:begin[i] + counts[i]] that may be similar, piece by piece."""
        ends = np.cumsum(counts)
        cuts = np.searchsorted(ends, np.arange(PIECE, ends[-1] if len(ends) else 0, PIECE))
        for one, other in itertools.pairwise(np.unique(np.concatenate([[0], cuts, [len(counts)]])).tolist()):
            sizes = counts[one:other]
            right = holders[ranges(begin[one:other], sizes)].astype(np.int64)
            yield self._may_be_similar(np.repeat(left[one:other], sizes), right)

    def _may_be_similar(self, left: Ints, right: Ints) -> tuple[Ints, Ints]:
        """The pairs that their sizes and their sketches allow to be similar."""
        both = self._sizes[left] + self._sizes[right]
        smaller = np.minimum(self._sizes[left], self._sizes[right])
        allowed = (smaller >= self._threshold * (both - smaller) - 1e-9) & (left != right)
        if self._apart is not None:
            allowed &= (self._apart[left] != self._apart[right]) | (self._apart[left] == 0)
        left, right, both = left[allowed], right[allowed], both[allowed]
        different = np.bitwise_count(self._sketches[left] ^ self._sketches[right]).sum(axis=1, dtype=np.int64)
        allowed = different <= (1 - self._threshold) / (1 + self._threshold) * both + 1e-6
        return left[allowed], right[allowed]

    def _verified(self, met: Iterator[tuple[Ints, Ints]]) -> Pairs:
        found = [np.unique(left * len(self._sets) + right) for left, right in met]
        pairs = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        left, right = np.divmod(pairs, max(1, len(self._sets)))
        score = jaccard(self._sets, left, right)
        is_similar = score >= self._threshold
        return Pairs(left[is_similar], right[is_similar], score[is_similar])


def greedy(join: Join, size: int) -> Ints:
    """Take rows 0 to size - 1 and keep each that is similar to none kept before it; the join then holds the kept ones.

    Rows are settled block by block; a block so dense that too many of its pairs meet is settled in halves.
    """
    kept: list[Ints] = []
    waiting = [np.arange(begin, min(begin + BLOCK, size)) for begin in range(0, size, BLOCK)][::-1]
    while waiting:
        block = waiting.pop()
        block = block[~np.isin(block, join.matches(block).left)]
        pairs = join.matches_among(block)
        if pairs is None:
            half = len(block) // 2
            waiting += [block[half:], block[:half]]
            continue
        block = block[~np.isin(block, first_kept(pairs.left, pairs.right))]
        join.add(block)
        kept.append(block)
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def first_kept(later: Ints, earlier: Ints) -> Ints:
    """Which rows go when each similar to a kept earlier one goes, rows being numbered in the order they are taken.

    (1 after 0), (2 after 1)  ->  1 goes, 2 stays
    """
    gone: set[int] = set()
    for row, other in sorted(zip(later.tolist(), earlier.tolist(), strict=True)):
        if other not in gone:
            gone.add(row)
    return np.array(sorted(gone), np.int64)


def jaccard(sets: Ngrams, left: Ints, right: Ints) -> npt.NDArray[np.float64]:
    """|left & right| / |left | right| of each pair of rows."""
    common = np.zeros(len(left), np.int64)
    sizes = sets.sizes
    both = sizes[left] + sizes[right]
    for begin, end in pieces(both, PIECE, 2**11):
        common[begin:end] = _common(sets, left[begin:end], right[begin:end])
    return common / np.maximum(both - common, 1)


def _common(sets: Ngrams, left: Ints, right: Ints) -> Ints:
    """|left & right| of up to 2^11 pairs.

    The elements of both sides are sorted together, the pair's number in front: what stands twice is common. The number
    takes the place of 11 of a hash's 64 bits.
    """
    sizes = sets.sizes
    numbers = np.arange(len(left), dtype=np.uint64) << np.uint64(53)
    sides = [
        np.repeat(numbers, sizes[rows]) | (sets.grams[ranges(sets.offsets[rows], sizes[rows])] >> np.uint64(11))
        for rows in (left, right)
    ]
    together = np.concatenate(sides)
    together.sort()
    twice = together[1:][together[1:] == together[:-1]] >> np.uint64(53)
    return np.bincount(twice.astype(np.int64), minlength=len(left))


def _groups(ascending: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """(where each run of equal values begins, how long it is)."""
    first = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)])
    return first, np.diff(np.append(first, len(ascending)))


def _prefixes(sets: Ngrams, threshold: float, frequencies: Frequencies) -> tuple[Ints, npt.NDArray[np.int32]]:
    """The prefix of each set as codes: those of row i are codes[offsets[i]:offsets[i + 1]].

    0.55 * 100 is a little above 55 in floating point: without the 1e-9 the prefix would be one element short.
    An element is ordered by 8 bits of its frequency and 44 of its hash; should two elements of a set agree in them,
    they count as one that stands in the set twice, for which the theorem holds as well.
    """
    wanted = sets.sizes - np.ceil(threshold * sets.sizes - 1e-9).astype(np.int64) + 1
    sizes, found = [], []
    for begin, end in pieces(sets.sizes, PIECE, 2**12):
        inside = sets.offsets[begin : end + 1] - sets.offsets[begin]
        grams = sets.grams[sets.offsets[begin] : sets.offsets[end]]
        rows = np.repeat(np.arange(end - begin, dtype=np.uint64) << np.uint64(52), sets.sizes[begin:end])
        ordered = rows | (_rarity(frequencies.of(grams)) << np.uint64(44)) | (grams >> np.uint64(20))
        ordered.sort()
        prefix = ordered[ranges(inside[:-1], wanted[begin:end])]
        prefix = prefix[(prefix >> np.uint64(44)) & np.uint64(0xFF) > 1]
        sizes.append(np.bincount((prefix >> np.uint64(52)).astype(np.int64), minlength=end - begin))
        found.append(prefix & np.uint64(2**52 - 1))
    elements = np.concatenate(found) if found else np.zeros(0, np.uint64)
    offsets = starts(np.concatenate(sizes)) if sizes else np.zeros(1, np.int64)
    del found
    distinct, counts = np.unique(elements, return_counts=True)
    distinct = distinct[counts > 1]
    codes = np.searchsorted(distinct, elements)
    codes[codes == len(distinct)] = 0
    is_met = distinct[codes] == elements if len(distinct) else np.zeros(len(elements), bool)
    return starts(is_met)[offsets], codes[is_met].astype(np.int32)


def _rarity(counts: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Frequencies in 8 bits: up to 127 as they are, then in steps of an eighth of a doubling."""
    many = np.clip(128 + 8 * np.log2(np.maximum(counts, 128) / 128), 128, 255)
    return np.where(counts < 128, counts, many).astype(np.uint64)


def _sketches(sets: Ngrams) -> npt.NDArray[np.uint64]:
    """(rows, SKETCH_WORDS): bit b says whether an odd number of the row's elements fall on it.

    An element that one of two sets has alone changes one bit: they differ by at least as many elements as bits (bitmap
    filter, Sandes et al. 2017).
    """
    sketches = np.empty((len(sets), SKETCH_WORDS), np.uint64)
    for begin, end in pieces(sets.sizes, PIECE):
        grams = sets.grams[sets.offsets[begin] : sets.offsets[end]]
        bits = np.uint64(1) << (grams & np.uint64(63))
        words = (grams >> np.uint64(6)) % np.uint64(SKETCH_WORDS)
        for word in range(SKETCH_WORDS):
            chosen = np.where(words == word, bits, np.uint64(0))
            sketches[begin:end, word] = np.bitwise_xor.reduceat(chosen, sets.offsets[begin:end] - sets.offsets[begin])
    return sketches
