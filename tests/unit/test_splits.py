"""Splits: what hangs together stays together, and stays where it is."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from stages.lib import splits
from stages.lib.dedup import Facts
from stages.lib.errors import DataError
from stages.lib.schema.split import SPLITS, Split
from stages.lib.splits import OUT, TEST, TRAIN, VALIDATION

SETTINGS = Split(seed=42, validation_fraction=0.1, test_fraction=0.2, max_rows={}, out_of_distribution=[])


def facts(
    groups: Sequence[str],
    ids: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    official: Sequence[str | None] | None = None,
    sources: Sequence[str] | None = None,
) -> Facts:
    count = len(groups)
    whole = np.arange(count)
    return Facts(
        id=pa.array(ids or [f"row {number:06}" for number in range(count)], pa.string()),
        group=pa.array(groups, pa.string()),
        task=pa.array(["chat"] * count),
        source=pa.array(sources or ["file"] * count),
        label=pa.array(labels or [None] * count, pa.string()),
        split=pa.array(official or [None] * count, pa.string()),
        characters=whole,
        key=np.zeros((count, 2), np.uint64),
        tie=whole.astype(np.uint64),
    )


def grouped(groups: int, each: int = 3) -> list[str]:
    return [f"group {group}" for group in range(groups) for _ in range(each)]


def shares(split: splits.Array) -> list[float]:
    return [float((split == number).mean()) for number in range(len(SPLITS))]


def hashed(name: str) -> int:
    """Where a group that hangs together with no other stands, by the promise itself: 56 bits of a sha256."""
    point = int(hashlib.sha256(f"42 {name}".encode()).hexdigest()[:14], 16) / 2**56
    return TEST if point < 0.2 else VALIDATION if point < 0.3 else TRAIN


def test_the_split_of_a_group_is_a_hash_of_the_seed_and_its_name() -> None:
    names = [f"g{number}" for number in range(40)]
    placed = splits.place(facts(names), np.arange(40), SETTINGS)
    assert placed.split.tolist() == [hashed(name) for name in names]
    assert (placed.components, placed.largest_component, placed.linked.num_rows) == (40, 1, 0)


def test_no_group_and_no_cluster_stands_in_two_splits() -> None:
    groups = grouped(200)
    clusters = np.arange(600)
    clusters[::40] = -1
    placed = splits.place(facts(groups), clusters, SETTINGS)
    assert len(set(placed.split[::40].tolist())) == 1
    assert len(set(zip(groups, placed.split.tolist(), strict=True))) == 200
    assert placed.largest_component == 3 * len(set(groups[::40]))


def test_the_largest_group_of_a_component_decides_and_the_rows_it_pulls_are_listed() -> None:
    names = [f"g{number}" for number in range(40)]
    small, large = (next(name for name in names if hashed(name) == split) for split in (TEST, TRAIN))
    placed = splits.place(facts([small, large, large, *names]), np.array([7, 7, *range(100, 141)]), SETTINGS)
    assert placed.split[:3].tolist() == [TRAIN] * 3
    assert placed.linked.filter(pa.compute.equal(placed.linked["id"], "row 000000")).to_pylist() == [
        {"id": "row 000000", "group": small, "split": "train", "alone": "test", "with_group": large}
    ]


def test_ten_percent_more_rows_move_less_than_one_percent_and_every_moved_row_is_listed() -> None:
    groups = grouped(4000)
    labels = [f"label {number % 7}" for number in range(12_000)]
    for given in (None, labels):
        clusters = np.arange(13_200)
        clusters[12_000:12_009:3] = clusters[:9:3]  # three new rows resemble rows of three old groups
        more = grouped(4400)
        before = splits.place(facts(groups, labels=given), np.arange(12_000), SETTINGS)
        after = splits.place(facts(more, labels=given and given + given[:1200]), clusters, SETTINGS)
        moved = np.flatnonzero(before.split != after.split[:12_000])
        listed = {*before.linked["id"].to_pylist(), *after.linked["id"].to_pylist()}
        assert len(moved) < 120
        assert {f"row {number:06}" for number in moved} <= listed


def test_places_do_not_depend_on_the_order_of_the_rows() -> None:
    groups = grouped(500)
    labels = [f"label {number % 5}" for number in range(1500)]
    clusters = np.arange(1500) // 4
    order = np.random.default_rng(0).permutation(1500)
    found = facts(groups, labels=labels)
    one, other = splits.place(found, clusters, SETTINGS), splits.place(found.take(order), clusters[order], SETTINGS)
    assert one.split[order].tolist() == other.split.tolist()
    assert one.linked.sort_by("id") == other.linked.sort_by("id")


@pytest.mark.parametrize("seed", range(4))
def test_from_ten_thousand_components_on_sizes_are_within_a_point_however_uneven_they_are(seed: int) -> None:
    sizes = np.minimum(np.random.default_rng(seed).zipf(1.7, 10_000), 4000)
    groups = np.repeat([f"{seed} {number}" for number in range(10_000)], sizes).tolist()
    placed = splits.place(facts(groups), np.arange(len(groups)), SETTINGS)
    assert shares(placed.split) == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert placed.metrics()["split/share/test"] == shares(placed.split)[TEST]


def test_a_component_of_more_than_a_point_of_many_rows_is_train() -> None:
    large = next(f"large {number}" for number in range(100) if hashed(f"large {number}") == TEST)
    groups = [*grouped(10_000, 1), *[large] * 300]
    placed = splits.place(facts(groups), np.arange(10_300), SETTINGS)
    assert placed.split[-1] == TRAIN
    assert shares(placed.split) == pytest.approx([0.7, 0.1, 0.2], abs=0.01)


def test_each_label_is_divided_as_requested() -> None:
    labels = [*["frequent"] * 2000, *["rare"] * 200, *["single"]]
    names = [f"g{number}" for number in range(2201)]
    for seed in range(10):
        settings = replace(SETTINGS, seed=seed)
        split = splits.place(facts(names, labels=labels), np.arange(2201), settings).split
        assert shares(split[:2000]) == pytest.approx([0.7, 0.1, 0.2], abs=0.011)
        assert shares(split[2000:2200]) == pytest.approx([0.7, 0.1, 0.2], abs=0.045)


def test_rows_without_a_group_stand_alone() -> None:
    assert splits.place(facts([""] * 300), np.arange(300), SETTINGS).components == 300


def test_another_seed_splits_otherwise_also_when_it_is_zero() -> None:
    ways = [
        splits.place(facts(grouped(200)), np.arange(600), Split(seed, 0.1, 0.2, {}, [])).split.tolist()
        for seed in (0, 1)
    ]
    assert ways[0] != ways[1]


def test_an_empty_split_is_an_error_that_says_why() -> None:
    with pytest.raises(
        DataError, match=r"no row; 3 rows form 1 groups that must stay whole.*split\.validation_fraction"
    ):
        splits.place(facts(["a"] * 3), np.arange(3), SETTINGS)


def test_an_official_split_is_kept_and_only_validation_is_taken_out_of_its_train() -> None:
    official = ["train"] * 800 + ["test"] * 200
    split = splits.place(facts([""] * 1000, official=official), np.arange(1000), SETTINGS).split
    assert (split[800:] == TEST).all()
    assert (split[:800] != TEST).all()
    assert (split[:800] == VALIDATION).mean() == pytest.approx(0.1, abs=0.03)


def test_three_official_splits_are_kept_to_the_row() -> None:
    official = [SPLITS[number % 3] for number in range(90)]
    placed = splits.place(facts([""] * 90, official=official), np.zeros(90), SETTINGS)  # one cluster of all
    assert [SPLITS[number] for number in placed.split] == official
    assert placed.linked.num_rows == 0


def test_an_official_train_without_anything_to_measure_with_is_divided_like_any_rows() -> None:
    names = [f"g{number}" for number in range(40)]
    placed = splits.place(facts(names, official=["train"] * 40), np.arange(40), SETTINGS)
    assert placed.split.tolist() == [hashed(name) for name in names]


def test_a_train_row_whose_group_is_officially_held_out_is_out() -> None:
    official = ["train", "train", "test", "validation", "train"]
    split = splits.place(facts(["a", "b", "a", "b", "c"], official=official), np.arange(5), SETTINGS).split
    assert split.tolist() == [OUT, OUT, TEST, VALIDATION, TRAIN]


def test_a_row_without_an_official_split_goes_where_the_rows_it_is_linked_to_stand() -> None:
    official = ["test", None, "train", None, "validation"]
    found = facts(["a", "a", "b", "", "c"], official=official)
    split = splits.place(found, np.array([1, 2, 3, 3, 4]), SETTINGS).split
    assert split.tolist() == [TEST, TEST, TRAIN, TRAIN, VALIDATION]


def test_synthetic_rows_are_train_tie_nothing_together_and_are_out_where_their_group_is_held_out() -> None:
    names = [f"g{number}" for number in range(40)]
    held = next(name for name in names if hashed(name) == TEST)
    other = next(name for name in names if hashed(name) == TRAIN)
    sources = [*["file"] * 40, *["synthetic"] * 32]
    groups = [*names, held, other, *[f"new {number}" for number in range(30)]]
    clusters = np.arange(72)
    clusters[41:43] = clusters[names.index(other)], clusters[names.index(held)]
    split = splits.place(facts(groups, sources=sources), clusters, SETTINGS).split
    assert split[:40].tolist() == [hashed(name) for name in names]
    assert split[40:].tolist() == [OUT, *[TRAIN] * 31]


def test_rows_out_of_distribution_are_test_only_move_nobody_and_are_out_where_they_belong_to_others() -> None:
    names = [f"g{number}" for number in range(40)]
    held = next(name for name in names if hashed(name) == TEST)
    other = next(name for name in names if hashed(name) == TRAIN)
    sources = [*["file"] * 40, *["far"] * 6]
    groups = [*names, held, other, "far 1", "far 1", "far 2", "far 3"]
    clusters = np.arange(46)
    clusters[44:46] = clusters[names.index(other)], clusters[names.index(held)]
    settings = replace(SETTINGS, out_of_distribution=["far"])
    official = [*[None] * 40, *["train"] * 6]
    placed = splits.place(facts(groups, sources=sources, official=official), clusters, settings)
    assert placed.split[:40].tolist() == [hashed(name) for name in names]
    assert placed.split[40:].tolist() == [TEST, OUT, TEST, TEST, OUT, TEST]
    assert placed.metrics()["split/share/test"] == pytest.approx(sum(hashed(name) == TEST for name in names) / 40)


def test_a_larger_limit_only_adds_rows_and_each_split_and_task_has_its_own() -> None:
    split = np.array([TRAIN] * 50 + [TEST] * 50)
    task = np.array(["chat", "summary"] * 50)
    rank = splits.ranks([str(number) for number in range(100)], seed=7)
    small = splits.limit(split, task, rank, {"train": {"chat": 5}, "test": {"chat": 0}})
    large = splits.limit(split, task, rank, {"train": {"chat": 9}, "test": {"chat": 0}})
    assert (small[(split == TRAIN) & (task == "chat")].sum(), small[(split == TEST) & (task == "chat")].sum()) == (5, 0)
    assert small[task == "summary"].all()
    assert (large & small).tolist() == small.tolist()


def test_weights_give_the_largest_mix_of_each_split() -> None:
    split = np.array([TRAIN] * 11 + [TEST] * 3 + [OUT])
    source = np.array([*"aaaaabbbbbb", *"bbc", "a"])
    stays = splits.mix(split, source, np.arange(15), {"a": 1.0, "b": 3.0})
    assert Counter(source[stays & (split == TRAIN)].tolist()) == {"a": 2, "b": 6}
    assert Counter(source[stays & (split == TEST)].tolist()) == {"b": 2, "c": 1}  # c has no weight: it is not mixed
    assert not stays[-1]


def test_a_smaller_fraction_of_train_is_contained_in_a_larger_one_also_below_limits_and_weights() -> None:
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(400)]
    sources = ["a", "a", "a", "b"] * 100
    found = facts([""] * 400, ids=ids, sources=sources)
    split = np.array([TRAIN] * 360 + [TEST] * 40)
    settings = Split(42, 0.1, 0.2, {"train": {"chat": 200}}, [])
    reasons = {
        part: splits.reduced(found, split, settings, {"a": 1.0, "b": 1.0}, part) for part in (0.1, 0.25, 0.5, 1.0)
    }
    kept = [set(np.flatnonzero(found == "").tolist()) for found in reasons.values()]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    train = Counter(reasons[0.5][:360].tolist())
    assert train["limit"] == 160
    assert train["fraction"] == train[""]
    assert train.total() == 360
    assert (reasons[0.1][360:] == reasons[1.0][360:]).all()


def test_without_limits_weights_and_fraction_every_row_stays() -> None:
    found = facts([""] * 3)
    assert splits.reduced(found, np.zeros(3, np.int8), SETTINGS, {}, 1.0).tolist() == ["", "", ""]
