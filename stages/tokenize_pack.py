"""Stage tokenize_pack: render rows with the chat template, label what is learned, pack; report on the data.

Reads data/splits and the tokenizer of models/base, and for the report what prepare and dedup_split say about the rows;
writes data/packed, reports/data, plots/lengths.csv, plots/labels.csv and metrics/tokenize_pack.json.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from stages.lib import chat, data_page, engine, files, limits, packing, progress, records, stage, tracking
from stages.lib.schema.pack import Pack

SPLITS = ("train", "validation")
BASE = Path("models/base")
ROWS = 5_000  # encoded at once


@dataclass
class Params:
    pack: Pack


def main(p: Params) -> None:
    limits.check_length(BASE, p.pack.max_tokens)
    tokenizer = chat.load_tokenizer(BASE)
    metrics: dict[str, float] = {}
    lengths = {}
    with files.replacing(Path("data/packed")) as folder:
        for split in SPLITS:
            (folder / split).mkdir(parents=True)
            with packing.collected(encoded(tokenizer, split, p.pack), folder / split) as found:
                packing.check(found, p.pack, where=f"data/splits/{split}.parquet")
                packs = packing.packs(found.tokens, max_tokens=p.pack.max_tokens)
                n_packs = packing.write(folder / split / "packs.parquet", packs)
                for name, rows in (("dropped", found.dropped), ("cut", found.cut)):
                    files.write_jsonl(folder / split / f"{name}.jsonl", sorted(rows, key=lambda row: row["id"]))
                metrics |= packing.account(found, n_packs, max_tokens=p.pack.max_tokens, split=split)
                lengths[split] = found.lengths
    histogram = packing.length_histogram(lengths, max_tokens=p.pack.max_tokens)
    labels = packing.labels_by_role(metrics)
    files.write_csv(Path("plots/lengths.csv"), histogram)
    files.write_csv(Path("plots/labels.csv"), labels)
    with files.replacing(Path("reports/data")) as folder:
        folder.mkdir()
        (folder / "index.html").write_text(page(tokenizer, p.pack, metrics, histogram, labels), encoding="utf-8")
    tracking.report("tokenize_pack", metrics)


def encoded(tokenizer: PreTrainedTokenizerFast, split: str, p: Pack) -> Iterator[packing.Batch]:
    """The split's rows, encoded some at a time, in their order."""
    path = Path(f"data/splits/{split}.parquet")
    work = functools.partial(packing.encoded, tokenizer=tokenizer, p=p, where=str(path))
    rows = pq.read_metadata(path).num_rows
    batches = engine.ordered_map(work, records.batches(path, ROWS))
    yield from progress.rows(batches, rows, what=f"{split} tokenized", size=lambda batch: batch.counts["rows/in"])


def page(
    tokenizer: PreTrainedTokenizerFast,
    p: Pack,
    metrics: dict[str, float],
    histogram: list[dict[str, int]],
    labels: list[dict[str, Any]],
) -> str:
    """The report, from what this stage and those before it found."""
    train = Path("data/splits/train.parquet")
    sample = data_page.sample(train)
    first = sample.slice(0, 3 * data_page.ROWS)  # some of which may be dropped
    shown = packing.encoded(first, tokenizer=tokenizer, p=p, where=str(train))
    return data_page.render(
        files.read_json(Path("metrics/prepare.json")),
        files.read_json(Path("metrics/dedup_split.json")),
        metrics,
        rejected=data_page.examples(Path("data/prepared/rejected.jsonl"), "code"),
        duplicates=data_page.examples(Path("data/splits/duplicates.jsonl")),
        contamination=data_page.examples(Path("data/splits/contamination.jsonl")),
        linked=data_page.linked(Path("data/splits/linked.parquet")),
        lengths=histogram,
        labels=labels,
        spoken=data_page.languages_of(sample),
        rows=data_page.rendered(sample, shown.tokens, tokenizer),
        max_tokens=p.max_tokens,
    )


if __name__ == "__main__":
    stage.run("tokenize_pack", main, Params, start=engine.start)
