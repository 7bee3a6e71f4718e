"""dedup_split: nothing of test is in train, nothing is dropped without a count and a reason."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import dedup_split
from stages.lib import dedup, files, records, splits
from stages.lib.schema.dedup import Dedup
from stages.lib.schema.split import Split

DEDUP = Dedup(threshold=0.8, shingle_words=3, shared_fraction=0.5, num_perm=128, bands=32)
WORDS = [first + second for first in "bcdfghklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "ir", "os")]


def corpus(size: int = 2000, *, every: int = 4) -> list[dict[str, Any]]:
    """Rows of 200 groups; each `every`-th repeats another row, word for word or with a few words changed."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    for number in range(size):
        words = rng.choices(WORDS, k=40)
        if texts and number % every == 0:
            words = list(rng.choice(texts))
            for _ in range(rng.choice([0, 1, 2, 8])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(words)
        prompt = f"Please read this text and answer. {' '.join(words)}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]
        rows.append(
            records.make(turns, group=f"group {rng.randrange(200)}", source=f"source {number % 3}", task="read")
        )
    return rows


def run(rows: list[dict[str, Any]], max_rows: dict[str, dict[str, int]] | None = None) -> dict[str, float]:
    files.write_rows(Path("data/prepared/rows-00000.parquet"), rows, records.RECORD)
    split = Split(seed=42, validation_fraction=0.1, test_fraction=0.2, max_rows=max_rows or {})
    dedup_split.main(dedup_split.Params(dedup=DEDUP, split=split))
    return files.read_json(Path("metrics/dedup_split.json"))


def parts() -> dict[str, list[dict[str, Any]]]:
    return {split: files.read_rows(Path(f"data/splits/{split}.parquet")) for split in splits.SPLITS}


def test_no_pair_at_the_threshold_no_group_and_no_cluster_stands_in_two_splits(in_tmp: Path) -> None:
    metrics = run(corpus())
    assert metrics["duplicates/exact"] > 50
    assert metrics["duplicates/near"] > 50
    found = parts()
    shingles = {split: [dedup._ngrams(dedup.text(row), 3) for row in rows] for split, rows in found.items()}
    common = set.intersection(*(grams for sets in shingles.values() for grams in sets))  # the instruction
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        for left in shingles[one]:
            for right in shingles[other]:
                assert dedup.jaccard(frozenset(left - common), frozenset(right - common)) < DEDUP.threshold
        assert not {row["group"] for row in found[one]} & {row["group"] for row in found[other]}


def test_totals_reconcile_and_every_dropped_row_has_a_reason(in_tmp: Path) -> None:
    rows = corpus()
    metrics = run(rows, {"train": {"read": 100}, "test": {"read": 20}})
    dropped = files.read_rows(Path("data/splits/dropped.parquet"))
    assert metrics["rows/in"] == len(rows)
    assert metrics["rows/in"] == metrics["rows/dropped"] + sum(metrics[f"rows/{split}"] for split in splits.SPLITS)
    reasons = ("duplicates/exact", "duplicates/near", "duplicates/joined", "dropped/limit")
    assert metrics["rows/dropped"] == sum(metrics[reason] for reason in reasons) == len(dropped)
    assert (metrics["rows/train/read"], metrics["rows/test/read"]) == (100, 20)
    assert {row["reason"] for row in dropped} == {"exact", "near", "limit"}
    kept = {row["id"] for part in parts().values() for row in part} | {
        row["id"] for row in dropped if row["reason"] == "limit"
    }
    for row in dropped:
        assert row["cluster"]
        if row["reason"] in ("exact", "near"):
            assert row["kept_id"] in kept
            assert row["score"] >= DEDUP.threshold
    by_id = {row["id"] for row in rows}
    assert by_id == kept | {row["id"] for row in dropped}


def test_the_order_of_the_rows_changes_no_byte(in_tmp: Path) -> None:
    rows = corpus(400)
    run(rows)
    before = {path.name: files.sha256(path) for path in Path("data/splits").iterdir()}
    run(random.Random(1).sample(rows, len(rows)))
    assert {path.name: files.sha256(path) for path in Path("data/splits").iterdir()} == before


def test_a_pair_that_minhash_overlooks_is_found_by_the_join_and_dropped_from_train(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "candidate_pairs", lambda compared, settings: [])
    metrics = run(corpus())
    assert metrics["duplicates/near"] == 0
    assert metrics["duplicates/joined"] > 10
    joined = [row for row in files.read_rows(Path("data/splits/dropped.parquet")) if row["reason"] == "joined"]
    held_out = {row["id"] for split in ("test", "validation") for row in parts()[split]}
    assert all(row["kept_id"] in held_out for row in joined)


def test_adding_ten_percent_moves_less_than_one_percent_and_lists_what_it_moves(in_tmp: Path) -> None:
    rows = corpus(2200, every=10)
    run(rows[:2000])
    before = {row["id"]: split for split, part in parts().items() for row in part}
    listed = set(pq.read_table("data/splits/linked.parquet")["id"].to_pylist())
    run(rows)
    after = {row["id"]: split for split, part in parts().items() for row in part}
    moved = {id for id in set(before) & set(after) if before[id] != after[id]}
    assert len(moved) < 0.01 * len(before)
    # A row moves when a tie between groups comes or goes, or when its twin of another group is kept instead of it.
    listed |= set(pq.read_table("data/splits/linked.parquet")["id"].to_pylist())
    listed |= {row["id"] for row in files.read_rows(Path("data/splits/dropped.parquet")) if row["reason"] == "exact"}
    assert moved <= listed


def test_every_file_has_its_columns_even_when_it_is_empty(in_tmp: Path) -> None:
    run(corpus(60)[1::4])
    schema = pq.read_schema("data/splits/dropped.parquet")
    assert schema.field("score").type == pa.float64()
    assert pq.read_schema("data/splits/linked.parquet").names == ["id", "group", "split", "alone", "with_group"]
