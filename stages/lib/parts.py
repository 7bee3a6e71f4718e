"""The rows of each split on their way from data/prepared into data/splits, in bounded memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.lib import files, records
from stages.lib.dedup import Facts, compared_texts
from stages.lib.ngrams import Ints
from stages.lib.schema.split import SPLITS

BUCKET_CHARACTERS = 2**25  # of the rows that are sorted at once
NOISY = "noisy"


class Parts:
    """Sends every row to its split; then gives the rows of a split by id.

    split: (rows,) of each row of data/prepared, in the order they are read: its number in SPLITS, or less than 0.
    shown: rows whose texts are wanted, whether they have a split or not; they are in `texts` when all rows were sent.
    """

    def __init__(self, folder: Path, facts: Facts, split: Ints, shown: Ints) -> None:
        self._split, self._shown = split, np.unique(shown)
        self.texts: dict[int, str] = {}
        folder.mkdir()
        counts = {
            name: 1 + int(facts.characters[split == n].sum()) // BUCKET_CHARACTERS for n, name in enumerate(SPLITS)
        }
        counts[NOISY] = counts["train"]
        self._buckets = {name: files.Buckets(folder / name, records.RECORD, count) for name, count in counts.items()}

    def send(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Send all rows, in the order they are read; gives those of train."""
        begin = 0
        for batch in batches:
            end = begin + len(batch)
            shown = self._shown[np.searchsorted(self._shown, begin) : np.searchsorted(self._shown, end)]
            texts = compared_texts(batch.take(pa.array(shown - begin)))
            self.texts |= dict(zip(shown.tolist(), texts.to_pylist(), strict=True))
            parts = {name: batch.filter(pa.array(self._split[begin:end] == n)) for n, name in enumerate(SPLITS)}
            for name, part in parts.items():
                self._buckets[name].add(part)
            yield parts["train"]
            begin = end

    def add(self, twins: pa.RecordBatch) -> None:
        """Noisy twins of rows of train, which will stand among them."""
        self._buckets[NOISY].add(twins)

    def batches(self, *names: str) -> Iterator[pa.RecordBatch]:
        """The rows of splits, or the noisy twins; nothing can be added to them any more."""
        for name in names:
            bucket = self._buckets[name]
            for number in range(len(bucket)):
                yield from bucket.table(number).to_batches(max_chunksize=10_000)

    def write(self, folder: Path, contaminated: pa.Array, unwanted: pa.Array) -> None:
        """One Parquet file a split, by id: rows without the contaminated, twins without the unwanted, by their ids."""
        for name in SPLITS:
            rows = self._buckets[name]
            with pq.ParquetWriter(folder / f"{name}.parquet", records.RECORD, compression="zstd") as file:
                for number in range(len(rows)):
                    table = _without(rows.table(number), contaminated)
                    if name == "train":
                        twins = _without(self._buckets[NOISY].table(number), unwanted)
                        table = pa.concat_tables([table, twins]).combine_chunks().sort_by("id")
                    file.write_table(table)


def _without(rows: pa.Table, ids: pa.Array) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["id"], value_set=ids))) if len(ids) else rows
