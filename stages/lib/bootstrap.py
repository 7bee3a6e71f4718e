"""How sure a figure is, or a difference between two arms: a bootstrap over test rows (Efron and Tibshirani, 1993).

A statistic takes one array (samples, rows) for each column of a row's numbers, and gives one figure a sample.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Statistic = Callable[..., Numbers]
Columns = Sequence[Sequence[float]]

ROWS_AT_ONCE = 2_000_000  # resampled rows in memory, 16 MB a column


@dataclass(frozen=True)
class Difference:
    """A figure of one arm minus that of the other, with the percentile interval of its resamples."""

    delta: float
    low: float
    high: float


def mean(values: Numbers) -> Numbers:
    """Mean over rows."""
    found: Numbers = values.sum(axis=1) / values.shape[1]
    return found


def ratio(values: Numbers, weights: Numbers) -> Numbers:
    """Sum over sum: nats of all rows over tokens of all rows is the loss per token."""
    found: Numbers = values.sum(axis=1) / weights.sum(axis=1)
    return found


def macro_f1(labels: Numbers, predicted: Numbers) -> Numbers:
    """Mean, over the labels that occur in a sample or are predicted there, of their F1; labels are numbers from 0."""
    size = 1 + int(max(labels.max(), predicted.max()))
    start = size * np.arange(len(labels))[:, None]

    def counts(codes: Numbers, of: Numbers | None = None) -> Numbers:
        """Rows of each label, (samples, size)."""
        weights = None if of is None else of.ravel().astype(np.float64)
        places = (start + codes).astype(np.int64).ravel()
        return np.bincount(places, weights, minlength=len(labels) * size).reshape(-1, size).astype(np.float64)

    right, either = counts(labels, labels == predicted), counts(labels) + counts(predicted)
    f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    found: Numbers = f1.sum(axis=1) / (either > 0).sum(axis=1)
    return found


def figure(statistic: Statistic, columns: Columns) -> float:
    """The statistic of the rows as they are."""
    return float(statistic(*(np.asarray(column, np.float64)[None] for column in columns))[0])


def interval(
    statistic: Statistic, columns: Columns, *, samples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """The percentile interval of a figure, rows drawn with replacement."""
    rows = [np.asarray(column, np.float64) for column in columns]
    drawn = [statistic(*(column[chosen] for column in rows)) for chosen in _draws(len(rows[0]), samples, seed)]
    return _percentiles(np.concatenate(drawn), confidence)


def paired(
    statistic: Statistic, ours: Columns, theirs: Columns, *, samples: int, confidence: float, seed: int
) -> Difference:
    """The difference ours - theirs of a statistic over the same rows, resampled row by row with replacement.

    Both arms of a row are drawn together, so what makes a row hard for both cancels out. All columns of a row are
    drawn with it: with nll and tokens as columns and `ratio`, the figure is the loss per token.

    Args: ours, theirs: the statistic's columns, each with one number per row, in the same order of rows.
    """
    a, b = ([np.asarray(column, np.float64) for column in columns] for columns in (ours, theirs))
    assert len({column.shape for column in (*a, *b)}) == 1
    assert len(a[0]) > 0
    deltas = [
        statistic(*(column[chosen] for column in a)) - statistic(*(column[chosen] for column in b))
        for chosen in _draws(len(a[0]), samples, seed)
    ]
    low, high = _percentiles(np.concatenate(deltas), confidence)
    return Difference(figure(statistic, ours) - figure(statistic, theirs), low, high)


def _draws(rows: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Places of rows drawn with replacement, (samples, rows) in parts; equal seeds and rows give equal draws."""
    rng = np.random.default_rng(seed)
    for start in range(0, samples, at_once := max(1, ROWS_AT_ONCE // rows)):
        yield rng.integers(rows, size=(min(at_once, samples - start), rows))


def _percentiles(drawn: Numbers, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
