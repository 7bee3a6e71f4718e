"""Contamination: training rows that contain what validation, test or a benchmark asks.

The share of a held-out row's word n-grams that is found in one training row decides; case and punctuation do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stages.lib.schema.dedup import Contamination


@dataclass(frozen=True)
class Hit:
    """A training row that holds most of a held-out row."""

    id: str  # of the training row
    overlaps: str  # id of the row of validation or test; `file:line` of a benchmark's row
    where: str  # validation, test, or the benchmark's file name
    share: float  # of the held-out row's n-grams
    matched: str  # the first of them, as text


def hits(
    train: Iterable[pa.RecordBatch],
    held_out: Iterable[tuple[str, pa.RecordBatch]],
    settings: Contamination,
    shared_fraction: float,
) -> list[Hit]:
    """Every training row of which a held-out row's n-grams make up at least `min_overlap`, by id; its closest match each.

    Args: train: records (records.RECORD, at least id, kind, messages, text, chosen, task). held_out: (split, records),
        rows of test and validation; the benchmarks of the settings are read here. shared_fraction: as dedup's.
    """
    raise NotImplementedError


def benchmarks(path: Path) -> Iterable[tuple[str, pa.Array, pa.Array]]:
    """(file name, `file:line` of rows, all text of each row) of a file, or of each file of a folder, by name."""
    raise NotImplementedError
