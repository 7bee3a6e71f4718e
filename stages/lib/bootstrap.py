"""How sure a difference between two arms is: a paired bootstrap over test rows (Efron and Tibshirani, 1993, ch. 16)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
ROWS_AT_ONCE = 2_000_000  # resampled rows in memory, 16 MB


@dataclass(frozen=True)
class Difference:
    """Mean of one arm minus mean of the other, with the percentile interval of its resamples."""

    delta: float
    low: float
    high: float

    def verdict(self, *, higher_is_better: bool) -> str:
        """`better`, `worse`, or `cannot tell` when the interval holds zero."""
        if self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean, in the order of the rows."""
    return float(_means(np.asarray(values, float)[None], np.asarray(weights, float)[None])[0])


def paired(
    ours: Sequence[float],
    theirs: Sequence[float],
    weights: Sequence[float],
    *,
    samples: int,
    confidence: float,
    seed: int,
    transform: Callable[[Numbers], Numbers] = lambda means: means,
) -> Difference:
    """The difference ours - theirs of two means over the same rows, resampled row by row with replacement.

    Both arms of a row are drawn together, so what makes a row hard for both cancels out. Weights are drawn with their
    row: with nll per token as values and tokens as weights, the mean is the loss per token.

    Args: ours, theirs, weights: one number per row, in the same order of rows; weights above 0.
        transform: of the means, before they are subtracted, for instance exp for perplexities.
    """
    a, b, w = (np.asarray(numbers, dtype=np.float64) for numbers in (ours, theirs, weights))
    assert a.shape == b.shape == w.shape
    assert len(a) > 0
    rng = np.random.default_rng(seed)
    deltas = []
    for start in range(0, samples, at_once := max(1, ROWS_AT_ONCE // len(a))):
        drawn = rng.integers(len(a), size=(min(at_once, samples - start), len(a)))
        deltas.append(transform(_means(a[drawn], w[drawn])) - transform(_means(b[drawn], w[drawn])))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(deltas), [tail, 1 - tail])
    delta = (transform(_means(a[None], w[None])) - transform(_means(b[None], w[None])))[0]
    return Difference(float(delta), float(low), float(high))


def _means(values: Numbers, weights: Numbers) -> Numbers:
    """Weighted means of (samples, rows)."""
    means: Numbers = (values * weights).sum(axis=1) / weights.sum(axis=1)
    return means
