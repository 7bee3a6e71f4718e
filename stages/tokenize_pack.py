"""Stage tokenize_pack: render rows with the chat template, label what is learned, pack; report on the data.

Reads data/splits and the tokenizer of models/base, and for the report what prepare and dedup_split say about the rows;
writes data/packed, reports/data, plots/lengths.csv, plots/labels.csv and metrics/tokenize_pack.json.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from stages.lib import engine, files, packing, records, stage, tracking
from stages.lib.schema.pack import Pack

SPLITS = ("train", "validation")
BASE = Path("models/base")
ROWS = 4_000  # encoded at once


@dataclass
class Params:
    pack: Pack


def main(p: Params) -> None:
    metrics: dict[str, float] = {}
    lengths = {}
    with files.replacing(Path("data/packed")) as folder:
        for split in SPLITS:
            (folder / split).mkdir(parents=True)
            with packing.collected(encoded(split, p.pack), folder / split) as found:
                packing.check(found, p.pack, where=f"data/splits/{split}.parquet")
                packs = packing.packs(found.tokens, max_tokens=p.pack.max_tokens)
                n_packs = packing.write(folder / split / "packs.parquet", packs)
                for name, rows in (("dropped", found.dropped), ("cut", found.cut)):
                    files.write_jsonl(folder / split / f"{name}.jsonl", sorted(rows, key=lambda row: row["id"]))
                metrics |= packing.account(found, n_packs, max_tokens=p.pack.max_tokens, split=split)
                lengths[split] = found.lengths
    files.write_csv(Path("plots/lengths.csv"), packing.length_histogram(lengths, max_tokens=p.pack.max_tokens))
    files.write_csv(Path("plots/labels.csv"), packing.labels_by_role(metrics))
    tracking.report("tokenize_pack", metrics)


def encoded(split: str, p: Pack) -> Iterator[packing.Batch]:
    """The split's rows, encoded some at a time, in their order."""
    path = Path(f"data/splits/{split}.parquet")
    work = functools.partial(packing.encoded, folder=BASE, p=p, where=str(path))
    rows = pq.read_metadata(path).num_rows
    with tqdm(total=rows, desc=f"tokenize_pack {split}", unit="row", unit_scale=True, disable=None) as bar:
        for batch in engine.ordered_map(work, records.batches(path, ROWS)):
            yield batch
            bar.update(batch.counts["rows/in"])


if __name__ == "__main__":
    stage.run("tokenize_pack", main, Params, start=engine.start)
