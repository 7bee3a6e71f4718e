"""Train, validation and test: rows that hang together stay together, and stay where they are when rows are added."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stages.lib import records
from stages.lib.errors import DataError
from stages.lib.schema.split import OUT_OF_DISTRIBUTION, SPLITS, Split

if TYPE_CHECKING:
    from stages.lib.dedup import Facts

Array: TypeAlias = np.ndarray[Any, Any]

TRAIN, VALIDATION, TEST, OUT = 0, 1, 2, -1  # numbers of SPLITS; OUT: dropped, since its group is held out officially
NO_SPLIT = -1
MANY = 10_000  # components from which the sizes are promised
TOLERANCE = 0.008  # of the rows; the promise is 0.01, and rows are dropped after they were placed
TIGHTER = (1.0, 0.5, 0.25, 0.0)  # how much of what chance does to a label's share is left as it is
LINKED = pa.schema([(name, pa.string()) for name in ("id", "group", "split", "alone", "with_group")])


@dataclass(frozen=True)
class Placed:
    """Where rows stand.

    split: (rows,) numbers in SPLITS, or OUT. linked: rows that stand elsewhere than a hash of their own group and the
    requested fractions alone would put them, and with whose group they stand there; a row whose place changes when rows
    are added is listed before or after.
    """

    split: Array
    apart: Array  # (rows,) those of sources out of distribution
    linked: pa.Table
    components: int
    largest_component: int  # rows

    def metrics(self) -> dict[str, float]:
        placed = self.split[(self.split != OUT) & ~self.apart]
        shares = np.bincount(placed, minlength=len(SPLITS)) / max(1, len(placed))
        return {
            "split/components": self.components,
            "split/largest_component": self.largest_component,
            "split/linked_rows": self.linked.num_rows,
            **{f"split/share/{split}": float(share) for split, share in zip(SPLITS, shares, strict=True)},
        }


def place(facts: "Facts", clusters: Array, settings: Split) -> Placed:
    """Place each component of rows, linked by a common group or a common cluster of near-duplicates, in one split.

        group A: a1 a2      cluster {a2, b1}      ->  a1 a2 b1 are one component, c1 another
        group B: b1
        group C: c1

    The split follows from a hash of the seed and the name of the component's largest group: rows that come later move
    nothing, unless they tie two groups together. Where that makes a split too large or too small (from 10,000
    components on, and for each label), as many components as needed at the border of two splits go to the other one.

    Rows with an official split stay there, and pull along what is linked to them and has none. If the data name no
    official validation, it is taken out of the official train by the hash; test too, if nothing else could be in it.
    A row of train whose group is held out officially is OUT. Synthetic rows are train, or OUT. Rows of the sources in
    split.out_of_distribution are test, or OUT where their group or cluster stands elsewhere; they move no other row.

    Args: facts: rows in canonical order. clusters: (rows,) equal numbers for rows of one cluster.
    Raises: DataError, when a split stays empty.
    """
    group, names = _codes(pc.if_else(pc.equal(facts.group, ""), facts.id, facts.group))
    synthetic = _flags(pc.equal(facts.source, records.SYNTHETIC))
    apart = is_apart(facts.source, settings)
    synthetic &= ~apart
    official = _official(facts.split)
    official[apart] = NO_SPLIT
    given = official != NO_SPLIT
    real = ~(synthetic | apart)
    component = _components(group[real], clusters[real], len(names))[group]  # of a row whose group is synthetic: unused
    count = int(component.max(initial=-1)) + 1
    rows_of = np.bincount(component[real], minlength=count)
    strictest = np.full(count, NO_SPLIT, np.int8)
    np.maximum.at(strictest, component[real], official[real])  # no split < train < validation < test
    leader = _leaders(group[real], component[real], len(names), count, names)
    label = _labels(component[real], facts.label.filter(pa.array(real)), count)

    exists = rows_of > 0
    is_free, is_train = exists & (strictest == NO_SPLIT), exists & (strictest == TRAIN)
    names_test = bool((official == TEST).any()) or bool((~given & real).any())
    wanted = (settings.test_fraction, settings.validation_fraction)
    taken = (0.0 if names_test else wanted[0], 0.0 if (official == VALIDATION).any() else wanted[1])
    point = np.zeros(len(names))
    asked = np.unique(group[real & (official <= TRAIN)])
    point[asked] = positions(names.take(pa.array(asked)).to_pylist(), settings.seed)
    # a split that is not taken gives its room to train: what it would hold comes last
    shift = wanted[0] - taken[0]
    turned = (point - shift) % 1.0

    split_of_component = strictest.copy()
    for chosen, at, fractions in ((is_free, point, wanted), (is_train, turned, taken)):
        split_of_component[chosen] = _divided(at[leader[chosen]], rows_of[chosen], label[chosen], *fractions)
    split = split_of_component[component]
    held = given & (official != TRAIN)
    split[held] = official[held]
    split[given & (official == TRAIN) & (strictest[component] > TRAIN)] = TRAIN
    split[synthetic] = TRAIN
    split[apart] = TEST
    of_group = np.full(len(names), NO_SPLIT, np.int8)
    np.maximum.at(of_group, group[real], split[real])
    split[split < of_group[group]] = OUT
    elsewhere = ~apart & (split != TEST)
    near = np.isin(group, group[elsewhere]) | np.isin(clusters, clusters[elsewhere])
    split[apart & near] = OUT

    alone = np.where(given, _plain(turned[group], *taken), _plain(point[group], *wanted))
    is_linked = real & (split != OUT) & (split != alone) & ~held & ~(given & (strictest[component] > TRAIN))
    found = np.flatnonzero(is_linked)
    linked = pa.table(
        [
            facts.id.take(pa.array(found)),
            names.take(pa.array(group[found])),
            _split_names(split[found]),
            _split_names(alone[found]),
            names.take(pa.array(leader[component[found]])),
        ],
        schema=LINKED,
    )
    empty = [name for number, name in enumerate(SPLITS) if not (split == number).any()]
    if empty:
        raise DataError(
            f"{' and '.join(empty)}: no row; {len(split)} rows form {int(exists.sum())} groups that must stay whole"
            + (f", and {int(given.sum())} rows have an official split" if given.any() else "")
            + ". Add rows, raise split.validation_fraction or split.test_fraction, or change split.seed."
        )
    return Placed(split, apart, linked, int(exists.sum()), int(rows_of.max()))


def is_apart(source: pa.Array, settings: Split) -> Array:
    """Which rows are of a source out of distribution."""
    return _flags(pc.is_in(source, value_set=pa.array(sorted(settings.out_of_distribution), pa.string())))


def named_apart(batch: pa.RecordBatch, settings: Split) -> pa.RecordBatch:
    """Records, those of a source out of distribution under a task of their own: parameters -> parameters_ood."""
    own = pc.binary_join_element_wise(batch["task"], OUT_OF_DISTRIBUTION, "")
    task = pc.if_else(pa.array(is_apart(batch["source"], settings)), own, batch["task"])
    place = batch.schema.get_field_index("task")
    return batch.set_column(place, batch.schema.field(place), task)


def positions(names: Iterable[str], seed: int) -> Array:
    """For each name a place in [0, 1) that depends on the name and the seed alone."""
    digests = b"".join(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8] for name in names)
    return (np.frombuffer(digests, ">u8") >> np.uint64(8)).astype(np.float64) / 2**56


def _plain(point: Array, test: float, validation: float) -> Array:
    """The split of each position by the requested fractions: | test | validation | train |."""
    return np.where(point < test, TEST, np.where(point < test + validation, VALIDATION, TRAIN)).astype(np.int8)


def _divided(point: Array, rows: Array, label: Array, test: float, validation: float) -> Array:
    """The split of each component by its position; the borders moved where a share would be far from the request.

        position   0 ..... test ..... test + validation ..... 1
                      test  | validation   |  train              a border moves by whole components

    Args: rows, label: of each component; label -1 where there is none.
    """
    plain = _plain(point, test, validation)
    total = int(rows.sum())
    is_many = len(rows) >= MANY
    if not total or not test + validation or not (is_many or (label >= 0).any()):
        return plain
    # one component of more than the tolerance could make a held-out split consist of little else: train has room for it
    small = np.flatnonzero(rows <= TOLERANCE * total) if is_many else np.arange(len(rows))
    strata = _strata(label[small], min(share for share in (test, validation) if share))
    every = (
        np.bincount(strata, rows[small]) * total / max(1, rows[small].sum())
    )  # rows to divide, large components' too
    order = np.lexsort((point[small], strata))
    starts = np.searchsorted(strata[order], np.arange(len(every) + 1))
    best: tuple[float, Array] | None = None
    for chance in TIGHTER:
        split = np.full(len(rows), TRAIN, np.int8)
        for stratum, (start, end) in enumerate(pairwise(starts)):
            chosen = small[order[start:end]]
            first, second = _borders(point[chosen], rows[chosen], every[stratum], test, validation, chance)
            split[chosen[:first]], split[chosen[first:second]] = TEST, VALIDATION
        shares = np.bincount(split, rows, minlength=3) / total
        off = float(np.abs(shares - (1 - test - validation, validation, test)).max())
        if best is None or off < best[0]:
            best = off, split
        if off <= TOLERANCE or not is_many:
            break
    assert best is not None
    return best[1]


def _borders(point: Array, rows: Array, every: float, test: float, validation: float, chance: float) -> tuple[int, int]:
    """How many of the components, by position, are test, and how many test or validation.

    As many as stand before the requested fractions, if the shares are then within a tolerance: a standard deviation of
    what chance makes of components of these sizes and one component more, at least TOLERANCE. Else as many as bring
    them within it. A narrower one would move more rows whenever some are added.
    """
    reached = np.concatenate([[0], np.cumsum(rows)])
    size = float(rows.mean()) if len(rows) else 0.0
    spread = float(np.sqrt(np.square(rows, dtype=np.float64).sum()))

    def tolerance(share: float) -> float:
        return max(TOLERANCE * every, chance * (spread * np.sqrt(share * (1 - share)) + size))

    wanted, room = test * every, tolerance(test)
    first = _border(reached, int(np.searchsorted(point, test)), wanted - room, wanted + room) if test else 0
    wanted, room = (test + validation) * every, tolerance(test + validation)
    low, high = reached[first] + validation * every - room, reached[first] + validation * every + room
    before = int(np.searchsorted(point, test + validation))
    return first, max(first, _border(reached, before, max(low, wanted - room), min(high, wanted + room)))


def _border(reached: Array, number: int, low: float, high: float) -> int:
    """The number of components nearest to `number` whose rows, reached[number], lie between low and high."""
    first = int(np.searchsorted(reached, low, "left"))
    last = int(np.searchsorted(reached, high, "right")) - 1
    if first > last:  # no number does: the one that comes nearest to the middle
        middle = (low + high) / 2
        near = [max(0, last), min(len(reached) - 1, first)]
        return min(near, key=lambda place: abs(reached[place] - middle))
    return min(max(number, first), last)


def _strata(label: Array, smallest_share: float) -> Array:
    """Labels as numbers from 0; those of too few components to be in every split are one."""
    _, code, size = np.unique(label, return_inverse=True, return_counts=True)
    _, strata = np.unique(np.where(size[code] * smallest_share < 1, -1, code), return_inverse=True)
    return np.asarray(strata)


def _components(group: Array, cluster: Array, groups: int) -> Array:
    """(groups,) the component of each group: groups are linked by rows of a common cluster."""
    _, cluster = np.unique(cluster, return_inverse=True)
    nodes = groups + int(cluster.max(initial=-1)) + 1
    edges = coo_matrix((np.ones(len(group), np.int8), (group, groups + cluster)), shape=(nodes, nodes))
    return np.asarray(connected_components(edges, directed=False)[1][:groups])


def _leaders(group: Array, component: Array, groups: int, components: int, names: pa.Array) -> Array:
    """(components,) the group of most rows of each component; of equals the first by name."""
    rows = np.bincount(group, minlength=groups)
    component_of = np.full(groups, -1, np.int64)
    component_of[group] = component
    leader = np.zeros(components, np.int64)
    present = np.flatnonzero(component_of >= 0)
    leader[component_of[present]] = present
    shared = present[np.bincount(component_of[present], minlength=components)[component_of[present]] > 1]
    rank = np.empty(len(shared), np.int64)
    rank[pc.sort_indices(names.take(pa.array(shared))).to_numpy()] = np.arange(len(shared))
    best = shared[np.lexsort((-rank, rows[shared]))]  # the last one written stays
    leader[component_of[best]] = best
    return leader


def _labels(component: Array, label: pa.Array, components: int) -> Array:
    """(components,) the label of most rows of each component, as its number by name; -1 without."""
    found = np.full(components, -1, np.int64)
    if label.null_count == len(label):
        return found
    code, names = _codes(label)
    rank = np.empty(len(names), np.int64)
    rank[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    ranked = np.where(code < 0, len(names), rank[code])  # rows without a label are a label, the last one
    keys, counts = np.unique(component * (len(names) + 1) + ranked, return_counts=True)
    order = np.lexsort((-keys, counts))  # the last one written stays: most rows, then the first name
    found[keys[order] // (len(names) + 1)] = keys[order] % (len(names) + 1)
    return np.where(found == len(names), -1, found)


def _codes(column: pa.Array | pa.ChunkedArray) -> tuple[Array, pa.Array]:
    """(number of each value, the distinct values); null is -1."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    encoded = column.dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def _official(column: pa.Array) -> Array:
    numbers = pc.fill_null(pc.index_in(column, value_set=pa.array(SPLITS)), NO_SPLIT)
    return np.asarray(numbers.to_numpy(zero_copy_only=False)).astype(np.int8)


def _flags(column: pa.Array) -> Array:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False))


def _split_names(numbers: Array) -> pa.Array:
    return pa.array(SPLITS).take(pa.array(numbers, pa.int64()))


def reduced(facts: "Facts", split: Array, settings: Split, weights: Mapping[str, float], fraction: float) -> Array:
    """Why each row is left out of its split: "limit", "weight" or "fraction"; "" for one that stays or is OUT already.

    The fraction comes last, so that the training rows of a smaller one are contained in a larger one's whatever the
    limits and weights are.

    Args: split: (rows,) numbers in SPLITS or OUT. weights: of sources, see `mix`. fraction: of the rows of train.
    """
    reasons = np.full(len(split), "", dtype="<U8")
    if not any(settings.max_rows.values()) and not weights and fraction == 1:
        return reasons
    rank = ranks(facts.id.to_pylist(), settings.seed)
    sources = _text(facts.source)
    steps = (
        ("limit", lambda left: limit(left, _text(facts.task), rank, settings.max_rows)),
        ("weight", lambda left: mix(left, sources, rank, weights)),
        ("fraction", lambda left: portion(left, sources, rank, fraction)),
    )
    left = split.copy()
    for reason, step in steps:
        beyond = (left != OUT) & ~step(left)
        reasons[beyond] = reason
        left[beyond] = OUT
    return reasons


def ranks(ids: Sequence[str], seed: int) -> Array:
    """(rows,) the place of each row in the order in which rows are taken: by a hash of seed and id."""
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(positions(ids, seed), kind="stable")] = np.arange(len(ids))
    return rank


def limit(split: Array, task: Array, rank: Array, max_rows: Mapping[str, Mapping[str, int]]) -> Array:
    """Which rows stay when of each split and task at most max_rows[split][task] do: a larger limit only adds."""
    stays = split != OUT
    for name, tasks in max_rows.items():
        for limited, most in tasks.items():
            members = np.flatnonzero((split == SPLITS.index(name)) & (task == limited))
            stays[_by_rank(members, rank)[most:]] = False
    return stays


def mix(split: Array, source: Array, rank: Array, weights: Mapping[str, float]) -> Array:
    """Which rows stay so that in each split the sources in `weights` have these shares, as many rows as that allows.

        weights a: 1, b: 3    rows a: 5, b: 6    ->    a: 2, b: 6

    A source without rows in a split, and one without a weight, does not count there.
    """
    stays = split != OUT
    for number in range(len(SPLITS)):
        members = {name: np.flatnonzero((split == number) & (source == name)) for name in sorted(weights)}
        present = {name: found for name, found in members.items() if len(found)}
        if not present:
            continue
        whole = min(len(found) / weights[name] for name, found in present.items())
        for name, found in present.items():
            stays[_by_rank(found, rank)[round(whole * weights[name]) :]] = False
    return stays


def portion(split: Array, source: Array, rank: Array, fraction: float) -> Array:
    """Which rows stay when train is cut to a fraction of its rows, each source by itself."""
    stays = split != OUT
    for name in np.unique(source):
        members = np.flatnonzero((split == TRAIN) & (source == name))
        stays[_by_rank(members, rank)[round(fraction * len(members)) :]] = False
    return stays


def _by_rank(members: Array, rank: Array) -> Array:
    return np.asarray(members[np.argsort(rank[members])])


def _text(column: pa.Array) -> Array:
    """Strings to compare with; numbered first, since there are few of them."""
    code, names = _codes(column)
    return np.asarray(names.to_pylist(), dtype=object)[code]
