"""Noisy twins of training rows, none of them close to a row that is held out."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.lib import engine, noise, records
from stages.lib.dedup import Wording, compared_texts
from stages.lib.join import Join
from stages.lib.ngrams import Ngrams, word_ngrams
from stages.lib.schema.data import Noise
from stages.lib.schema.dedup import Dedup


@dataclass(frozen=True)
class Twins:
    """The twins of a batch of records: the rows, the ids of those they are made of, and their shingles."""

    rows: pa.RecordBatch
    made_of: pa.Array
    shingles: Ngrams


def _of_batch(batch: pa.RecordBatch, settings: Noise, length: int) -> Twins:
    found = [(row["id"], twin) for row in records.rows(batch) if (twin := noise.noisy(row, settings))]
    table = records.table([twin for _, twin in found]).combine_chunks()
    rows = pa.RecordBatch.from_arrays([_whole(column) for column in table.columns], schema=records.RECORD)
    return Twins(rows, pa.array([id for id, _ in found], pa.string()), word_ngrams(compared_texts(rows), length))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


@dataclass(frozen=True)
class Made:
    """All twins, without their content."""

    id: pa.Array
    task: pa.Array
    made_of: pa.Array
    shingles: Ngrams

    def unwanted(
        self,
        ids: pa.Array,
        contaminated: pa.Array,
        held_out: Iterable[pa.RecordBatch],
        wording: Wording,
        settings: Dedup,
    ) -> pa.Array:
        """Which twins must not be trained on, true or false for each.

        They have one of `ids`, those of the rows, or that of another twin; are contaminated, or made of a row that is;
        or reach the threshold with a held-out row, compared as rows are.
        """
        if not len(self.id):
            return pa.array([], pa.bool_())
        compared = partial(_shingles, wording=wording, length=settings.shingle_words)
        others = list(engine.ordered_map(compared, held_out))
        sets = Ngrams.joined([*others, wording.without(self.shingles, self.task)])
        first = len(sets) - len(self.id)
        near = Join(sets, settings.threshold)
        near.add(np.arange(first))
        is_close = np.isin(np.arange(first, len(sets)), near.matches(np.arange(first, len(sets))).left)
        counts = pc.value_counts(self.id)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        conditions = [
            pc.is_in(self.id, value_set=ids),
            pc.is_in(self.id, value_set=repeated),
            pc.is_in(self.id, value_set=contaminated),
            pc.is_in(self.made_of, value_set=contaminated),
        ]
        return reduce(pc.or_, conditions, pa.array(is_close))


def _shingles(rows: pa.RecordBatch, wording: Wording, length: int) -> Ngrams:
    return wording.without(word_ngrams(compared_texts(rows), length), rows["task"])


def made(train: Iterable[pa.RecordBatch], add: Callable[[pa.RecordBatch], None], settings: Noise, length: int) -> Made:
    """Make twins of the rows of train, hand them to `add`; all batches are taken, also when no twin is wanted.

    Args: length: of the shingles, words.
    """
    parts = []
    function = partial(_of_batch, settings=settings, length=length)
    if settings.fraction:
        for twins in engine.ordered_map(function, train):
            add(twins.rows)
            parts.append(twins)
    else:
        deque(train, maxlen=0)
    nothing = pa.array([], pa.string())
    return Made(
        pa.concat_arrays([nothing, *(part.rows["id"] for part in parts)]),
        pa.concat_arrays([nothing, *(part.rows["task"] for part in parts)]),
        pa.concat_arrays([nothing, *(part.made_of for part in parts)]),
        Ngrams.joined([part.shingles for part in parts]),
    )
