"""Splits: what hangs together stays together, and stays where it is."""

from typing import Any

import pytest

from stages.lib import records, splits
from stages.lib.errors import DataError
from stages.lib.schema.split import Split

SETTINGS = Split(seed=42, validation_fraction=0.1, test_fraction=0.2, max_rows={})


def rows_of(groups: int, per_group: int = 3, first: int = 0) -> list[dict[str, Any]]:
    return [
        records.make(
            [{"role": "user", "content": f"question {group} {number}"}, {"role": "assistant", "content": "answer"}],
            group=f"group {group}",
            source="test",
            task="chat",
        )
        for group in range(first, first + groups)
        for number in range(per_group)
    ]


def alone(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Clusters in which every row is by itself."""
    return {row["id"]: row["id"] for row in rows}


def where(placed: splits.Placed) -> dict[str, str]:
    return {row["id"]: split for split, part in placed.parts.items() for row in part}


def test_no_group_and_no_cluster_stands_in_two_splits() -> None:
    rows = rows_of(200)
    clusters = alone(rows)
    tied = [row["id"] for row in rows[::40]]
    clusters |= dict.fromkeys(tied, min(tied))
    placed = splits.by_component(rows, clusters, SETTINGS, seed=7)
    split = where(placed)
    for group in {row["group"] for row in rows}:
        assert len({split[row["id"]] for row in rows if row["group"] == group}) == 1
    assert len({split[id] for id in tied}) == 1
    assert placed.largest_component == 3 * len({row["group"] for row in rows if row["id"] in tied})


def test_rows_pulled_along_by_a_similar_row_of_another_group_are_listed() -> None:
    rows = rows_of(200)
    clusters = alone(rows)
    clusters |= dict.fromkeys([row["id"] for row in rows[::40]], "one")
    placed = splits.by_component(rows, clusters, SETTINGS, seed=7)
    split = where(placed)
    elsewhere = {row["id"] for row in rows if split[row["id"]] != splits.split_of(row["group"], SETTINGS, 7)}
    assert {linked.id for linked in placed.linked} == elsewhere


def test_ten_percent_more_rows_move_less_than_one_percent_and_every_moved_row_is_listed() -> None:
    rows = rows_of(1000)
    more = rows_of(100, first=1000)
    before = where(splits.by_component(rows, alone(rows), SETTINGS, seed=7))
    clusters = alone(rows + more)
    for old, new in zip(rows[:9:3], more[:9:3], strict=True):  # three new rows resemble rows of three old groups
        clusters[new["id"]] = clusters[old["id"]]
    placed = splits.by_component(rows + more, clusters, SETTINGS, seed=7)
    after = where(placed)
    moved = {row["id"] for row in rows if before[row["id"]] != after[row["id"]]}
    assert len(moved) < 0.01 * len(rows)
    assert moved <= {linked.id for linked in placed.linked}


def test_rows_without_a_group_stand_alone() -> None:
    rows = [{**row, "group": ""} for row in rows_of(300, per_group=1)]
    assert splits.by_component(rows, alone(rows), SETTINGS, seed=7).components == 300


def test_the_fractions_are_met_when_groups_are_many() -> None:
    rows = rows_of(3000, per_group=1)
    parts = splits.by_component(rows, alone(rows), SETTINGS, seed=7).parts
    assert len(parts["test"]) == pytest.approx(600, abs=60)
    assert len(parts["validation"]) == pytest.approx(300, abs=50)


def test_another_seed_splits_otherwise_also_when_it_is_zero() -> None:
    rows = rows_of(200)
    ways = [where(splits.by_component(rows, alone(rows), SETTINGS, seed=seed)) for seed in (0, 1)]
    assert ways[0] != ways[1]


def test_an_empty_split_is_an_error_that_says_why() -> None:
    rows = rows_of(1)
    with pytest.raises(
        DataError, match=r"no row; 3 rows form 1 groups that must stay whole.*split\.validation_fraction"
    ):
        splits.by_component(rows, alone(rows), SETTINGS, seed=7)


def test_a_near_duplicate_that_minhash_overlooked_is_taken_out_of_train_and_not_out_of_test() -> None:
    train, test, other = rows_of(3, per_group=1)
    shingles = {train["id"]: frozenset(range(10)), test["id"]: frozenset(range(9)), other["id"]: frozenset({77})}
    parts = {"train": [train, other], "validation": [], "test": [test]}
    clean, leaks = splits.without_leaks(parts, shingles, 0.8)
    assert clean == {"train": [other], "validation": [], "test": [test]}
    assert [(leak.row["id"], leak.kept_id, leak.score) for leak in leaks] == [(train["id"], test["id"], 0.9)]


def test_a_larger_limit_only_adds_rows_and_what_is_beyond_is_returned() -> None:
    parts = {"train": rows_of(50, per_group=2), "validation": [], "test": []}
    small, beyond = splits.limit(parts, {"train": {"chat": 20}}, seed=7)
    large, _ = splits.limit(parts, {"train": {"chat": 30}}, seed=7)
    assert len(small["train"]) == 20
    assert len(beyond) == 80
    assert {row["id"] for row in small["train"]} < {row["id"] for row in large["train"]}
    assert {row["id"] for row in small["train"]} | {row["id"] for row in beyond} == {
        row["id"] for row in parts["train"]
    }


def test_a_task_without_a_limit_is_kept_whole_and_a_limit_of_zero_keeps_nothing() -> None:
    parts = {"train": rows_of(5), "validation": [], "test": []}
    assert len(splits.limit(parts, {"train": {"summary": 1}}, seed=7)[0]["train"]) == 15
    assert splits.limit(parts, {"train": {"chat": 0}}, seed=7)[0]["train"] == []
