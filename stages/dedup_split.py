"""Stage dedup_split: drop duplicates and near-duplicates, then split so that what hangs together stays together.

Rows of the sources in split.out_of_distribution are tested on and nothing else, as tasks of their own.
Reads data/prepared and the benchmarks that dedup.contamination names; writes data/splits (one Parquet file a split,
dropped.parquet, linked.parquet, duplicates.jsonl, contamination.jsonl) and metrics/dedup_split.json.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.lib import (
    contamination,
    dedup,
    dropped,
    engine,
    files,
    progress,
    records,
    semantic,
    splits,
    stage,
    tracking,
    twins,
)
from stages.lib.dedup import Compared, Deduplicated, Facts
from stages.lib.join import Pairs
from stages.lib.ngrams import Ints
from stages.lib.parts import NOISY, Parts
from stages.lib.schema.data import Data
from stages.lib.schema.dedup import Dedup, Semantic
from stages.lib.schema.split import SPLITS, Split

HELD_OUT = ("validation", "test")
OTHER_REASONS = ("contaminated", "official", "weight", "fraction", "limit")


@dataclass
class Params:
    dedup: Dedup
    split: Split
    data: Data


def main(p: Params) -> None:
    compared = partial(dedup.compared, length=p.dedup.shingle_words)
    found = Compared.joined(engine.ordered_map(compared, batches("rows compared", p.split)))
    facts = found.facts
    if absent := sorted(set(p.split.out_of_distribution) - set(facts.source.unique().to_pylist())):
        print(f"split.out_of_distribution: no row is of the source {', '.join(absent)}; nothing is tested for it")
    distinct = dedup.near_duplicates(found, p.dedup, p.split.out_of_distribution)
    removed = dedup.removed_fractions(facts, distinct.dropped, p.dedup.max_removed_fraction)
    if p.dedup.semantic.model:
        distinct = without_semantic(facts, distinct, p.dedup.semantic, p.split)

    kept = distinct.kept[pc.sort_indices(facts.id.take(pa.array(distinct.kept))).to_numpy()]
    placed = splits.place(facts.take(kept), distinct.cluster[kept], p.split)
    left_out = splits.reduced(facts.take(kept), placed.split, p.split, weights(p.data), p.data.fraction)
    left_out = np.where(placed.split == splits.OUT, "official", left_out)
    split = np.full(len(facts), splits.OUT)
    split[kept] = np.where(left_out == "", placed.split, splits.OUT)

    with files.replacing(Path("data/splits")) as folder:
        folder.mkdir()
        shown = dropped.examples(facts, distinct)
        parts = Parts(folder / "buckets", facts, split, np.append(distinct.dropped[shown], distinct.repeats[shown]))
        noisy = twins.made(parts.send(batches("rows divided", p.split)), parts.add, p.data.noise, p.dedup.shingle_words)
        hits = contamination.hits(
            parts.batches("train", NOISY), held_out(parts), p.dedup.contamination, p.dedup.shared_fraction
        )
        hit = pa.array([hit.id for hit in hits], pa.string())
        tested = (batch for _, batch in held_out(parts))
        unwanted = noisy.unwanted(facts.id.take(pa.array(kept)), hit, tested, distinct.wording, p.dedup)
        parts.write(folder, hit, noisy.id.filter(unwanted))
        shutil.rmtree(folder / "buckets")
        gone = dropped.by_id(
            [
                dropped.duplicates(facts, distinct),
                dropped.table(facts, kept[left_out != ""], distinct.cluster, left_out[left_out != ""]),
                dropped.contaminated(facts, kept, distinct.cluster, hits),
            ]
        )
        pq.write_table(gone, folder / "dropped.parquet", compression="zstd")
        pq.write_table(placed.linked, folder / "linked.parquet", compression="zstd")
        dropped.write_examples(folder / "duplicates.jsonl", facts, distinct, shown, parts.texts)
        files.write_jsonl(folder / "contamination.jsonl", (asdict(hit) for hit in hits))

    split[pc.is_in(facts.id, value_set=hit).to_numpy(zero_copy_only=False)] = splits.OUT
    added = Counter(noisy.task.filter(pc.invert(unwanted)).to_pylist())
    shares = {f"removed_fraction/{source}": share for source, share in removed.items()}
    tracking.report("dedup_split", counts(facts, split, gone, added, hits) | shares | placed.metrics())


def without_semantic(facts: Facts, distinct: Deduplicated, settings: Semantic, split: Split) -> Deduplicated:
    """Drop, of what is left, the rows whose embedding is nearly that of one kept before them."""
    texts = dedup.texts_of(batches("texts embedded", split), distinct.kept)
    earlier, later, score = semantic.pairs(texts.to_pylist(), settings)
    return dedup.without_semantic(facts, distinct, Pairs(later, earlier, score))


def held_out(parts: Parts) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows nothing in train may repeat, with the name of their split."""
    return ((name, batch) for name in HELD_OUT for batch in parts.batches(name))


def counts(
    facts: Facts, split: Ints, gone: pa.Table, added: Counter[str], hits: Sequence[contamination.Hit]
) -> dict[str, float]:
    """rows/in + rows/noisy = rows/train + rows/validation + rows/test + rows/dropped; rows/dropped = all reasons.

    Args: split: of each row, less than 0 for one that is left out. added: noisy twins in train, by task.
    """
    tasks = {
        name: Counter(facts.task.filter(pa.array(split == number)).to_pylist()) for number, name in enumerate(SPLITS)
    }
    tasks["train"] += added
    reasons = Counter(gone["reason"].to_pylist())
    return {
        "rows/in": len(facts),
        "rows/dropped": len(gone),
        "rows/noisy": added.total(),
        **{f"rows/{name}": counted.total() for name, counted in tasks.items()},
        **{f"rows/{name}/{task}": n for name, counted in tasks.items() for task, n in sorted(counted.items())},
        **{f"duplicates/{reason}": reasons[reason] for reason in ("exact", "near", "semantic")},
        **{f"dropped/{reason}": reasons[reason] for reason in OTHER_REASONS},
        "contamination/hits": reasons["contaminated"],
        "contamination/benchmark_hits": sum(hit.where not in SPLITS for hit in hits),
    }


def batches(what: str, settings: Split) -> Iterator[pa.RecordBatch]:
    """All rows of data/prepared, in the order of its shards, by the tasks they are divided by."""
    found = (splits.named_apart(batch, settings) for batch in records.batches(Path("data/prepared")))
    return progress.rows(found, what=what, size=len)


def weights(data: Data) -> dict[str, float]:
    """The weight of each source that is given one."""
    return {name: data.each()[name].weight for name, entry in data.sources.items() if "weight" in entry}


if __name__ == "__main__":
    stage.run("dedup_split", main, Params, start=engine.start)
