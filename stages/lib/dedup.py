"""Exact and near duplicates: what of a row is compared, which rows repeat another, and which hang together by it.

Two rows are compared by the set of their word shingles, without the wording that most rows of their task share.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stages.lib import join, records
from stages.lib.errors import DataError
from stages.lib.join import Frequencies, Join, Pairs
from stages.lib.ngrams import PIECE, Hashes, Ints, Ngrams, Words, hashes, mixed, pieces, starts
from stages.lib.schema.dedup import Dedup, Keep

APART = 4  # the last of the tiers
MIN_ROWS_FOR_A_TEMPLATE = 10  # of a task: with fewer, "most rows" says nothing


@dataclass(frozen=True)
class Facts:
    """What is known of every row without its content, one entry a row in each column.

    A row is named by its number here: its place in data/prepared, counted through the shards.
    """

    id: pa.Array  # string
    group: pa.Array  # string; "": a row of its own
    task: pa.Array  # string, as are source, label and split
    source: pa.Array
    label: pa.Array  # null, where the row has none
    split: pa.Array  # the official one; null, where the data name none
    characters: Ints  # of what is compared
    key: npt.NDArray[np.uint64]  # (rows, 2): equal for rows with equal words
    tie: Hashes  # of all that two rows of one id may differ in

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: Ints) -> "Facts":
        return Facts(
            *(
                column[rows] if isinstance(column, np.ndarray) else column.take(pa.array(rows))
                for column in (getattr(self, field.name) for field in fields(self))
            )
        )

    @classmethod
    def joined(cls, parts: Sequence["Facts"]) -> "Facts":
        columns = []
        for field in fields(cls):
            found = [getattr(part, field.name) for part in parts]
            is_array = isinstance(found[0], np.ndarray)
            columns.append(np.concatenate(found) if is_array else pa.concat_arrays(found))
        return cls(*columns)


def compared_texts(found: pa.Table | pa.RecordBatch) -> pa.Array:
    """What of each record is compared: all its texts but the system's turns and the tools, which many rows share.

    In the order messages, text, chosen, rejected; each turn with its reasoning and its tool calls.
    """
    if isinstance(found, pa.Table):
        found = found.combine_chunks()
    columns = [_spoken(_array(found[name])) for name in ("messages", "chosen", "rejected")]
    columns.insert(1, _array(found["text"]))
    return pc.fill_null(pc.binary_join_element_wise(*columns, "\n", null_handling="skip"), "")


def _array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _spoken(lists: pa.Array) -> pa.Array:
    """The texts of each list of turns without the system's, one string a list."""
    turns = lists.flatten()
    role, *texts = (turns.field(name) for name in ("role", "reasoning_content", "content", "tool_calls"))
    said = pc.binary_join_element_wise(*texts, "\n", null_handling="skip")
    is_said = pc.and_(pc.not_equal(role, "system"), pc.is_valid(said))
    ends = starts(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
    before = starts(is_said.to_numpy(zero_copy_only=False))
    kept = pa.ListArray.from_arrays(pa.array(before[ends], pa.int32()), said.filter(is_said))
    return pc.if_else(pc.is_valid(lists), pc.binary_join(kept, "\n"), pa.scalar(None, pa.string()))


@dataclass(frozen=True)
class Compared:
    """What a batch of records, or all of them, are compared by."""

    facts: Facts
    shingles: list[Ngrams]  # of the rows in the order of facts, in one part or several

    @classmethod
    def joined(cls, parts: Iterable["Compared"]) -> "Compared":
        """All parts as one, rows counted through.

        Raises: DataError, when there is none.
        """
        found = list(parts)
        if not found:
            raise DataError("data/prepared: found no row, expected some. See rejected.jsonl there for why.")
        facts = Facts.joined([part.facts for part in found])
        return cls(facts, [shingles for part in found for shingles in part.shingles])


def compared(batch: pa.RecordBatch, length: int) -> Compared:
    """The facts and the shingles, runs of `length` words, of a batch of records."""
    texts = compared_texts(batch)
    words = Words.of(texts)
    apart = [batch[name].cast(pa.string()) for name in ("split", "group", "source", "meta")]
    columns = {name: batch[name] for name in ("id", "group", "task", "source", "label", "split")}
    facts = Facts(
        **columns,
        characters=pc.utf8_length(texts).to_numpy().astype(np.int64),
        key=words.keys(),
        tie=hashes(pc.binary_join_element_wise(*(pc.fill_null(column, "") for column in apart), "\0")),
    )
    return Compared(facts, [words.ngrams(length)])


@dataclass(frozen=True)
class Wording:
    """Shingles that more than a share of a task's rows hold: its template, which makes nobody alike."""

    shared: Hashes  # of task and shingle, ascending
    is_shared_in: set[str]  # tasks that have any

    @classmethod
    def of(cls, sets: Ngrams, tasks: pa.Array, fraction: float, frequencies: Frequencies) -> "Wording":
        """Count exactly what may be shared by its estimated frequency, which is never too low."""
        coded = tasks.dictionary_encode()
        codes = coded.indices.to_numpy().astype(np.int64)
        sizes = np.bincount(codes, minlength=len(coded.dictionary))
        limits = np.where(sizes >= MIN_ROWS_FOR_A_TEMPLATE, fraction * sizes, np.inf)
        names = hashes(coded.dictionary)
        counted = _Counted()
        for begin, end in pieces(sets.sizes, PIECE):
            grams = sets.grams[sets.offsets[begin] : sets.offsets[end]]
            task = np.repeat(codes[begin:end], sets.sizes[begin:end])
            often = frequencies.of(grams) > limits[task]
            counted.add(mixed(grams[often] ^ names[task[often]]), task[often])
        keys, counts, task = counted.all()
        is_shared = counts > limits[task]
        return cls(keys[is_shared], {coded.dictionary[code].as_py() for code in np.unique(task[is_shared]).tolist()})

    def without(self, sets: Ngrams, tasks: pa.Array) -> Ngrams:
        """The sets without it; a row of nothing but shared wording keeps its own, or it would equal all such rows."""
        if not len(self.shared):
            return sets
        coded = tasks.dictionary_encode()
        names = hashes(coded.dictionary)
        concerned = np.array([name in self.is_shared_in for name in coded.dictionary.to_pylist()], bool)
        codes = coded.indices.to_numpy()
        stays = np.ones(len(sets.grams), bool)
        for begin, end in pieces(sets.sizes, PIECE):
            inside = slice(sets.offsets[begin], sets.offsets[end])
            task = np.repeat(codes[begin:end], sets.sizes[begin:end])
            if concerned[codes[begin:end]].any():
                stays[inside] = ~_among(mixed(sets.grams[inside] ^ names[task]), self.shared)
        left = np.add.reduceat(stays, sets.offsets[:-1], dtype=np.int64) if len(sets) else sets.sizes
        for row in np.flatnonzero(left == 0).tolist():
            stays[sets.offsets[row] : sets.offsets[row + 1]] = True
        return Ngrams(starts(np.where(left == 0, sets.sizes, left)), sets.grams[stays])


def _among(values: Hashes, sought: Hashes) -> npt.NDArray[np.bool_]:
    """Which values are among the sought ones, of which there are few."""
    mask = np.uint64(2**20 - 1)
    is_likely = np.zeros(2**20, bool)
    is_likely[sought & mask] = True
    found = is_likely[values & mask]
    found[found] = np.isin(values[found], sought)
    return found


class _Counted:
    """How often keys were added, each with a mark that its equals share."""

    def __init__(self) -> None:
        self._parts: list[tuple[Hashes, Ints, Ints]] = []
        self._waiting = 0

    def add(self, keys: Hashes, marks: Ints) -> None:
        found, first, counts = np.unique(keys, return_index=True, return_counts=True)
        self._parts.append((found, counts, marks[first]))
        self._waiting += len(found)
        if self._waiting > 4 * PIECE:
            self._parts = [self.all()]
            self._waiting = 0

    def all(self) -> tuple[Hashes, Ints, Ints]:
        """(keys, ascending; how often each was added; its mark)."""
        keys, counts, marks = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        found, first, which = np.unique(keys, return_index=True, return_inverse=True)
        return found, np.bincount(which, weights=counts, minlength=len(found)).astype(np.int64), marks[first]


@dataclass(frozen=True)
class Deduplicated:
    """Which rows stay, which repeat one of them, and which hang together; rows by their numbers in the facts."""

    kept: Ints  # the first comes first when two rows are alike
    dropped: Ints
    repeats: Ints  # the kept row that each dropped one repeats
    score: npt.NDArray[np.float64]  # how similar they were when it was dropped
    reason: npt.NDArray[np.str_]  # exact, near or semantic
    cluster: Ints  # of every row: the row of its cluster with the smallest id
    official: npt.NDArray[np.int8]  # of every row: equal marks above 0 are of one official test or validation split
    wording: Wording


def near_duplicates(found: Compared, settings: Dedup, apart: Collection[str] = ()) -> Deduplicated:
    """Keep one row of every group of mutual duplicates.

        a ~ b, b ~ c, a !~ c  ->  a and c are kept, b is dropped for a; all three are one cluster

    Rows are taken one by one: those of an official test split first, then of an official validation split, then all
    others, then synthetic ones, then those of the sources `apart`; among themselves by id, or the longest first. A row
    is dropped for the most similar of the rows kept before it, so no two kept rows reach the threshold; only rows of
    one official test or validation split are not compared with each other. A dropped row ties all kept rows it is
    similar to into one cluster; rows apart tie nothing, so that the others stand where they would without them.

    Args: found: its shingles are consumed.
    """
    facts = found.facts
    rank, tier = ranks(facts), tiers(facts, apart)
    longest = -facts.characters if settings.keep is Keep.longest else np.zeros(len(facts), np.int64)
    order = np.lexsort((rank, longest, tier))  # the earlier is kept
    first = _first_with(facts.key, order)
    distinct = order[first[order] == order]  # from here on rows are numbered by their place in this
    sets = Ngrams.gathered(found.shingles, distinct)
    frequencies = Frequencies(sets)
    tasks = facts.task.take(pa.array(distinct))
    wording = Wording.of(sets, tasks, settings.shared_fraction, frequencies)
    sets = wording.without(sets, tasks)
    official = np.where(tier < 2, tier + 1, 0).astype(np.int8)

    near = Join(sets, settings.threshold, frequencies, official[distinct])
    kept = join.greedy(near, len(sets))
    dropped = np.setdiff1d(np.arange(len(sets)), kept, assume_unique=True)
    pairs = near.matches(dropped)
    closest, score = _closest(pairs)

    is_apart = tier[distinct] == APART
    ties = ~(is_apart[pairs.left] | is_apart[pairs.right])
    stands_for = np.arange(len(sets))
    stands_for[dropped] = closest
    repeated = np.flatnonzero(first != np.arange(len(facts)))
    place = np.empty(len(facts), np.int64)
    place[distinct] = np.arange(len(distinct))
    return Deduplicated(
        kept=distinct[np.sort(kept)],
        dropped=np.concatenate([repeated, distinct[dropped]]),
        repeats=distinct[stands_for[place[np.concatenate([first[repeated], distinct[dropped]])]]],
        score=np.concatenate([np.ones(len(repeated)), score]),
        reason=np.repeat(["exact", "near"], [len(repeated), len(dropped)]),
        cluster=clusters(
            rank, [(np.arange(len(facts)), first), (distinct[pairs.left[ties]], distinct[pairs.right[ties]])]
        ),
        official=official,
        wording=wording,
    )


def without_semantic(facts: Facts, found: Deduplicated, pairs: Pairs) -> Deduplicated:
    """Drop more rows, as "semantic": each that is alike to one kept before it, by pairs of places in `found.kept`."""
    mark = found.official[found.kept]
    may = (mark[pairs.left] != mark[pairs.right]) | (mark[pairs.left] == 0)
    left, right, score = pairs.left[may], pairs.right[may], pairs.score[may]
    gone = join.first_kept(left, right)
    ties = np.isin(left, gone) & ~np.isin(right, gone)
    left, right, score = left[ties], right[ties], score[ties]
    closest, similarity = _closest(Pairs(left, right, score))
    every = np.arange(len(facts))
    instead = every.copy()
    instead[found.kept[gone]] = found.kept[closest]
    return replace(
        found,
        kept=np.delete(found.kept, gone),
        dropped=np.concatenate([found.dropped, found.kept[gone]]),
        repeats=np.concatenate([instead[found.repeats], found.kept[closest]]),
        score=np.concatenate([found.score, similarity]),
        reason=np.concatenate([found.reason, np.full(len(gone), "semantic")]),
        cluster=clusters(ranks(facts), [(every, found.cluster), (found.kept[left], found.kept[right])]),
    )


def removed_fractions(facts: Facts, dropped: Ints, most: float) -> dict[str, float]:
    """Of each source the share of its rows that were dropped.

    Raises: DataError, where it is more than `most`.
    """
    coded = facts.source.dictionary_encode()
    codes = coded.indices.to_numpy()
    rows = np.bincount(codes, minlength=len(coded.dictionary))
    removed = np.bincount(codes[dropped], minlength=len(rows)) / np.maximum(rows, 1)
    found = dict(sorted(zip(coded.dictionary.to_pylist(), removed.tolist(), strict=True)))
    if beyond := [f"{share:.3f} of the rows of {source}" for source, share in found.items() if share > most]:
        raise DataError(
            f"data/prepared: {' and '.join(beyond)} repeat other rows, expected at most {most}. "
            "Look for a file given twice, or raise dedup.max_removed_fraction or dedup.threshold."
        )
    return found


def texts_of(batches: Iterable[pa.RecordBatch], rows: Ints) -> pa.Array:
    """What is compared of these rows of data/prepared, in this order, all in memory."""
    order = np.argsort(rows)
    wanted = rows[order]
    found, begin = [pa.array([], pa.string())], 0
    for batch in batches:
        here = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, begin + len(batch))] - begin
        found.append(compared_texts(batch.take(pa.array(here))))
        begin += len(batch)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(found).take(pa.array(back))


def ranks(facts: Facts) -> Ints:
    """Each row's place in the order of ids; rows of one id, which have equal content, by what else they have."""
    table = pa.table({"id": facts.id, "group": facts.group, "source": facts.source, "tie": facts.tie})
    order = pc.sort_indices(table, [(name, "ascending") for name in table.column_names]).to_numpy()
    rank = np.empty(len(facts), np.int64)
    rank[order] = np.arange(len(facts))
    return rank


def tiers(facts: Facts, apart: Collection[str]) -> Ints:
    """0: official test, 1: official validation, 2: all others, 3: synthetic, 4: of the sources `apart`."""
    conditions = [
        pc.is_in(facts.source, value_set=pa.array(sorted(apart), pa.string())),
        pc.equal(facts.source, records.SYNTHETIC),
        *(pc.equal(facts.split, name) for name in ("test", "validation")),
    ]
    held = [pc.fill_null(condition, False).to_numpy(zero_copy_only=False) for condition in conditions]
    return np.select(held, [APART, 3, 0, 1], 2)


def _first_with(keys: npt.NDArray[np.uint64], order: Ints) -> Ints:
    """For each row the first in the order whose key it has."""
    ordered = keys[order]
    by_key = np.lexsort((ordered[:, 1], ordered[:, 0]))  # stable: equal keys stay in the order
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[by_key[1:]] != ordered[by_key[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order[by_key]] = order[by_key[is_new]][np.cumsum(is_new) - 1]
    return first


def _closest(pairs: Pairs) -> tuple[Ints, npt.NDArray[np.float64]]:
    """For each left row the most similar of the right ones before it, the first of several, and their similarity."""
    before = pairs.right < pairs.left
    left, right, score = pairs.left[before], pairs.right[before], pairs.score[before]
    order = np.lexsort((right, -score, left))
    chosen = order[np.append(True, np.diff(left[order]) > 0)[: len(order)]]
    return right[chosen], score[chosen]


def clusters(rank: Ints, ties: Sequence[tuple[Ints, Ints]]) -> Ints:
    """For each row the row of smallest rank among all that the ties lead to."""
    left = np.concatenate([one for one, _ in ties])
    right = np.concatenate([other for _, other in ties])
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(rank), len(rank)))
    _, component = connected_components(graph, directed=False)
    by_rank = np.argsort(rank)
    names, first = np.unique(component[by_rank], return_index=True)
    smallest = np.empty(len(names), np.int64)
    smallest[names] = by_rank[first]
    return smallest[component]
