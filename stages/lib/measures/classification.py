"""Measures of a whole classification, from the labels of its rows and those predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Confusion:
    """How often each label was taken for each.

    labels: those that occur, right or predicted, sorted. counts: (labels, labels); row: the right one, column: the
    predicted one.
    """

    labels: list[str]
    counts: np.ndarray

    def mistakes(self) -> list[tuple[str, str, int]]:
        """(right, predicted, how often) of every two labels taken for each other, the most frequent first."""
        found = [
            (self.labels[right], self.labels[predicted], int(self.counts[right, predicted]))
            for right, predicted in zip(*np.nonzero(self.counts), strict=True)
            if right != predicted
        ]
        return sorted(found, key=lambda each: (-each[2], each[0], each[1]))


def confusion(labels: Sequence[str], predicted: Sequence[str]) -> Confusion:
    names, places = np.unique(np.array([*labels, *predicted]), return_inverse=True)
    return Confusion(names.tolist(), _counts(places[: len(labels)], places[len(labels) :], len(names)))


def macro_f1(labels: Sequence[str] | np.ndarray, predicted: Sequence[str] | np.ndarray) -> float:
    """Mean over the labels that occur, right or predicted, of each one's F1, as scikit-learn defines it.

    F1 is 2 right / (times it is the label + times it is predicted).

        labels a a b, predicted a b b  ->  a: 2·1 / (2 + 1), b: 2·1 / (1 + 2), mean 2/3

    Args: names, or their numbers in arrays, which is faster for many resamples.
    """
    names, places = np.unique(np.concatenate([np.asarray(labels), np.asarray(predicted)]), return_inverse=True)
    counts = _counts(places[: len(labels)], places[len(labels) :], len(names))
    return float((2 * counts.diagonal() / (counts.sum(axis=0) + counts.sum(axis=1))).mean())


def _counts(right: np.ndarray, predicted: np.ndarray, n: int) -> np.ndarray:
    """(n, n) from places of labels, (rows,) each."""
    return np.bincount(right * n + predicted, minlength=n * n).reshape(n, n)
