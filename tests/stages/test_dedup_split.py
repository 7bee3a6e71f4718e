"""dedup_split: nothing of test is in train, nothing is dropped without a count and a reason."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array

from stages import dedup_split
from stages.lib import config, dedup, engine, files, records
from stages.lib.ngrams import word_ngrams
from stages.lib.schema.runtime import Engine, Runtime
from stages.lib.schema.split import SPLITS

ROOT = Path(__file__).resolve().parents[2]
WORDS = [first + second for first in "bcdfghklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "ir", "os")]
REASONS = (
    *(f"duplicates/{reason}" for reason in ("exact", "near", "semantic")),
    *(f"dropped/{reason}" for reason in ("contaminated", "official", "weight", "fraction", "limit")),
)
Row = dict[str, Any]


def row(words: Sequence[str], **more: Any) -> Row:
    turns = [
        {"role": "user", "content": f"Please read this text and answer. {' '.join(words)}"},
        {"role": "assistant", "content": "yes"},
    ]
    return records.make(turns, **{"group": "", "source": "source 0", "task": "read", **more})


def corpus(size: int = 1000, *, every: int = 4) -> list[Row]:
    """Rows of 200 groups; each `every`-th repeats another row, word for word or with a few words changed."""
    rng = random.Random(0)
    rows: list[Row] = []
    texts: list[list[str]] = []
    for number in range(size):
        words = rng.choices(WORDS, k=40)
        if texts and number % every == 0:
            words = list(rng.choice(texts))
            for _ in range(rng.choice([0, 1, 2, 8])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(words)
        rows.append(row(words, group=f"group {rng.randrange(200)}", source=f"source {number % 3}"))
    return rows


def run(
    rows: Sequence[Row],
    *,
    max_rows: dict[str, dict[str, int]] | None = None,
    fraction: float = 1.0,
    noise: float = 0.0,
    sources: dict[str, Any] | None = None,
    shards: int = 1,
) -> dict[str, Any]:
    for number in range(shards):
        path = Path(f"data/prepared/rows-{number:05d}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(records.table(rows[number::shards]), path)
    Path("data/benchmarks").mkdir(exist_ok=True)
    p = config.load(dedup_split.Params, ["split.max_rows={}"], ROOT / "params.yaml")
    p.split.max_rows, p.data.fraction, p.data.noise.fraction = max_rows or {}, fraction, noise
    p.data.sources = sources or {}
    dedup_split.main(p)
    return files.read_json(Path("metrics/dedup_split.json"))


def part(split: str) -> list[Row]:
    return records.read(Path(f"data/splits/{split}.parquet"))


def ids(split: str) -> set[str]:
    return {row["id"] for row in part(split)}


def left_out() -> list[Row]:
    return files.read_rows(Path("data/splits/dropped.parquet"))


def written() -> dict[str, str]:
    return {path.name: files.sha256(path) for path in Path("data/splits").iterdir()}


def similarities(one: Sequence[Row], other: Sequence[Row]) -> np.ndarray[Any, Any]:
    """(rows, rows) the Jaccard similarity of all pairs, without the instruction that all rows share."""
    grams = word_ngrams(dedup.compared_texts(records.table([*one, *other])), 3)
    kinds, places, counts = np.unique(grams.grams, return_inverse=True, return_counts=True)
    held = csr_array((counts[places] <= len(grams) / 2, places, grams.offsets), shape=(len(grams), len(kinds)))
    held = held.astype(np.int32)
    common = (held[: len(one)] @ held[len(one) :].T).toarray()
    sizes = held.sum(axis=1)
    return common / (sizes[: len(one), None] + sizes[None, len(one) :] - common)


def test_no_pair_at_the_threshold_no_group_and_no_cluster_stands_in_two_splits(in_tmp: Path) -> None:
    metrics = run(corpus(3000))
    assert metrics["duplicates/exact"] > 50
    assert metrics["duplicates/near"] > 50
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        left, right = part(one), part(other)
        assert similarities(left, right).max() < 0.8
        assert not {row["group"] for row in left} & {row["group"] for row in right}


def test_totals_reconcile_and_every_dropped_row_has_a_reason(in_tmp: Path) -> None:
    rows = corpus()
    metrics = run(rows, max_rows={"train": {"read": 300}, "test": {"read": 20}}, fraction=0.9)
    dropped = left_out()
    assert metrics["rows/in"] == len(rows)
    assert metrics["rows/in"] == metrics["rows/dropped"] + sum(metrics[f"rows/{split}"] for split in SPLITS)
    assert metrics["rows/dropped"] == sum(metrics[reason] for reason in REASONS) == len(dropped)
    assert metrics["rows/train/read"] == metrics["rows/train"] == len(part("train"))
    assert metrics["rows/test/read"] == 20
    assert {row["reason"] for row in dropped} >= {"exact", "near", "limit", "fraction"}
    kept = {row["id"] for split in SPLITS for row in part(split)}
    kept |= {row["id"] for row in dropped if row["reason"] not in ("exact", "near")}
    for gone in dropped:
        assert gone["cluster"]
        if gone["reason"] in ("exact", "near"):
            assert gone["kept_id"] in kept
            assert gone["score"] >= 0.8
    assert {row["id"] for row in rows} == kept | {row["id"] for row in dropped}


def part_of(found: Row) -> list[str]:
    return str(found["messages"][0]["content"]).split()[6:]


def test_neither_the_order_of_the_rows_nor_the_shards_change_a_byte(in_tmp: Path) -> None:
    rows = corpus(400)
    run(rows, noise=0.2)
    before = written()
    run(random.Random(1).sample(rows, len(rows)), noise=0.2, shards=3)
    assert written() == before


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus(400)
    run(rows, noise=0.2, shards=4)
    before = written()
    monkeypatch.setattr(engine, "_runtime", Runtime(None, 2, Engine.local, None, "warning", None, 2))
    run(rows, noise=0.2, shards=4)
    assert written() == before


def test_rows_that_fill_many_buckets_are_written_by_id(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lib.parts.BUCKET_CHARACTERS", 3000)
    run(corpus(400), noise=0.2)
    for split in SPLITS:
        found = [row["id"] for row in part(split)]
        assert found == sorted(set(found))
    assert pq.ParquetFile("data/splits/train.parquet").num_row_groups > 5


def test_adding_ten_percent_moves_less_than_one_percent_and_lists_what_it_moves(in_tmp: Path) -> None:
    rows = corpus(2200, every=10)
    run(rows[:2000])
    before = {row["id"]: split for split in SPLITS for row in part(split)}
    listed = set(pq.read_table("data/splits/linked.parquet")["id"].to_pylist())
    run(rows)
    after = {row["id"]: split for split in SPLITS for row in part(split)}
    moved = {id for id in set(before) & set(after) if before[id] != after[id]}
    assert len(moved) < 0.01 * len(before)
    # A row moves when a tie between groups comes or goes, or when its twin of another group is kept instead of it.
    listed |= set(pq.read_table("data/splits/linked.parquet")["id"].to_pylist())
    listed |= {row["id"] for row in left_out() if row["reason"] == "exact"}
    assert moved <= listed


def test_rows_that_repeat_or_contain_an_official_test_row_are_dropped_for_it(in_tmp: Path) -> None:
    rows = [made | {"group": "", "split": "train"} for made in corpus(300, every=400)]
    tested = [row(random.Random(number).choices(WORDS, k=40), split="test") for number in range(1000, 1020)]
    near, whole = part_of(tested[0]), part_of(tested[1])
    repeating = row([*near[:20], "planted", *near[21:]], split="train")
    containing = row([*whole, *random.Random(2000).choices(WORDS, k=60)], split="train")
    metrics = run([*rows, *tested, repeating, containing])
    assert ids("test") == {row["id"] for row in tested}
    assert metrics["rows/train"] + metrics["rows/validation"] == len(rows)
    assert {(gone["id"], gone["kept_id"], gone["reason"]) for gone in left_out()} == {
        (repeating["id"], tested[0]["id"], "near"),
        (containing["id"], tested[1]["id"], "contaminated"),
    }
    assert metrics["contamination/hits"] == 1


def test_weights_of_sources_are_their_shares_of_each_split(in_tmp: Path) -> None:
    rows = [made | {"group": "", "source": "ab"[number % 2]} for number, made in enumerate(corpus(600, every=700))]
    metrics = run(rows, sources={"a": {"weight": 1.0}, "b": {"weight": 0.5}})
    for split in SPLITS:
        found = [row["source"] for row in part(split)]
        assert found.count("b") == pytest.approx(found.count("a") / 2, abs=1)
    assert metrics["dropped/weight"] > 100


def test_synthetic_rows_are_trained_on_and_never_held_out(in_tmp: Path) -> None:
    rows = [made | {"source": "synthetic" if number % 2 else "real"} for number, made in enumerate(corpus(600))]
    run([made | {"group": ""} for made in rows])
    assert {row["source"] for split in ("validation", "test") for row in part(split)} == {"real"}
    assert "synthetic" in {row["source"] for row in part("train")}


def test_noisy_twins_are_added_to_train_alone_and_none_is_close_to_a_held_out_row(in_tmp: Path) -> None:
    rows = corpus(600)
    run(rows)
    plain = {split: ids(split) for split in SPLITS}
    metrics = run(rows, noise=0.5)
    assert {split: ids(split) for split in SPLITS if split != "train"} == {
        split: plain[split] for split in SPLITS if split != "train"
    }
    twins = [row for row in part("train") if "noise_of" in row["meta"]]
    assert ids("train") - {row["id"] for row in twins} == plain["train"]
    assert {row["meta"]["noise_of"] for row in twins} <= plain["train"]
    assert metrics["rows/noisy"] == len(twins) > 100
    assert similarities(twins, part("test")).max() < 0.8


def test_pairs_of_duplicates_are_shown_with_both_texts(in_tmp: Path) -> None:
    run(corpus(200))
    lines = [json.loads(line) for line in Path("data/splits/duplicates.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 20
    near = {row["id"]: row for row in left_out() if row["reason"] == "near"}
    for line in lines:
        if line["reason"] == "near":
            assert near[line["id"]]["kept_id"] == line["kept_id"]
            assert line["text"] != line["kept_text"]


def test_every_file_has_its_columns_even_when_it_is_empty(in_tmp: Path) -> None:
    run(corpus(400)[1::4])
    schema = pq.read_schema("data/splits/dropped.parquet")
    assert schema.field("score").type == pa.float64()
    assert pq.read_schema("data/splits/linked.parquet").names == ["id", "group", "split", "alone", "with_group"]
    assert {path.name for path in Path("data/splits").iterdir()} == {
        *(f"{name}.parquet" for name in (*SPLITS, "dropped", "linked")),
        "duplicates.jsonl",
        "contamination.jsonl",
    }
