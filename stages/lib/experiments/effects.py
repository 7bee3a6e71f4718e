"""What each varied key does to the figure, all other keys held: main effects in a sweep, and which is larger.

Every answer here is a weighted sum of the settings' figures, (sums, settings), found by least squares, so that
`uncertainty` knows how sure it is. In a full grid the weights are those of plain averages:

    r        2     8     2     8
    modules  attn  attn  all   all        r 8 - r 2 = (-1, 1, -1, 1) / 2        all - attn = (-1, -1, 1, 1) / 2
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.lib.bootstrap import Numbers
from stages.lib.comparison import holm
from stages.lib.experiments import uncertainty
from stages.lib.experiments.uncertainty import Figures, Interval

MAX_LEVELS = 6  # of a number with more of them, as a search proposes, its slope over doublings is told
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Factor:
    """Keys that varied together, the shortest one named for all; its values, sorted."""

    keys: tuple[str, ...]
    levels: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.keys[0]

    @property
    def is_slope(self) -> bool:
        return len(self.levels) > MAX_LEVELS and all(_is_number(level) and level > 0 for level in self.levels)


@dataclass(frozen=True)
class Change:
    """The figure at one level minus that at a lower one, or at double a value; simultaneous over all changes."""

    low_level: Any
    high_level: Any
    difference: Interval


@dataclass(frozen=True)
class Effect:
    """What one factor does. levels: figure at each level, at the average of all else, each interval by itself.
    share: of the variance between settings. is_estimable: False where the points cannot tell it from other factors."""

    factor: Factor
    levels: tuple[Interval, ...]
    changes: tuple[Change, ...]
    share: float
    is_estimable: bool = True

    @property
    def largest(self) -> Change:
        return max(self.changes, key=lambda each: abs(each.difference.value))

    @property
    def bound(self) -> float:
        """What no difference between its levels exceeds, with the confidence of the intervals."""
        return max(max(abs(each.difference.low), abs(each.difference.high)) for each in self.changes)

    @property
    def is_told(self) -> bool:
        return any(each.difference.is_told for each in self.changes)


@dataclass(frozen=True)
class Interplay:
    """Whether what one factor does depends on another's level. share: of the variance between settings."""

    one: Factor
    other: Factor
    share: float
    p_value: float


def factors(settings: Sequence[Values]) -> list[Factor]:
    """What varied over settings; keys that always change together are one factor, since nobody can tell them apart."""
    found: dict[tuple[int, ...], list[str]] = {}
    for key in sorted({key for values in settings for key in values}, key=lambda key: (len(key), key)):
        seen: list[Any] = []
        for values in settings:
            if values.get(key) not in seen:
                seen.append(values.get(key))
        if len(seen) > 1:
            found.setdefault(tuple(seen.index(values.get(key)) for values in settings), []).append(key)
    return [
        Factor(
            tuple(keys), tuple(ordered({str(values.get(keys[0])): values.get(keys[0]) for values in settings}.values()))
        )
        for keys in found.values()
    ]


def ordered(levels: Any) -> list[Any]:
    """Numbers by size, before everything else by its text."""
    return sorted(levels, key=lambda each: (0, each, "") if _is_number(each) else (1, 0, str(each)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Design:
    """Which setting has which level, as columns of a least-squares fit: intercept, then those of each factor."""

    def __init__(self, settings: Sequence[Values], found: Sequence[Factor]) -> None:
        self.settings, self.factors = settings, list(found)
        self._columns = {factor: _columns(settings, factor) for factor in self.factors}
        self.matrix = np.hstack([np.ones((len(settings), 1)), *self._columns.values()])
        self._inverse = np.linalg.pinv(self.matrix)

    def place(self, factor: Factor) -> slice:
        start = 1 + sum(self._columns[each].shape[1] for each in self.factors[: self.factors.index(factor)])
        return slice(start, start + self._columns[factor].shape[1])

    def at(self, factor: Factor, level: int) -> Numbers:
        """The sum that is the figure at one level, the other factors as they are on average."""
        asked = self.matrix.mean(axis=0)
        asked[self.place(factor)] = _level(factor, level)
        return asked @ self._inverse

    def component(self, factor: Factor) -> Numbers:
        """Sums that give what a factor adds to each setting, (settings, settings), zero on average."""
        place = self.place(factor)
        columns = self.matrix[:, place] - self.matrix[:, place].mean(axis=0)
        return columns @ self._inverse[place]

    def residual(self) -> Numbers:
        """Sums that give what the factors, each by itself, leave of each setting."""
        return np.eye(len(self.matrix)) - self.matrix @ self._inverse

    def is_estimable(self, factor: Factor) -> bool:
        """Whether the differences between a factor's levels can be told from those of the others."""
        place = self.place(factor)
        return bool(
            np.allclose((self._inverse @ self.matrix)[place, place], np.eye(place.stop - place.start), atol=1e-8)
        )


def _columns(settings: Sequence[Values], factor: Factor) -> Numbers:
    return np.stack([_level(factor, factor.levels.index(values.get(factor.name))) for values in settings])


def _level(factor: Factor, level: int) -> Numbers:
    """A level as numbers: which of all but the first it is; of a slope, the doublings to it."""
    if factor.is_slope:
        return np.array([np.log2(factor.levels[level])])
    return np.eye(len(factor.levels))[level, 1:]


def effects(found: Figures, settings: Sequence[Values], *, confidence: float) -> list[Effect]:
    """What each factor does; those that the points can tell first, the largest first."""
    design = Design(settings, factors(settings))
    total = float(((found.means - found.means.mean()) ** 2).sum()) or 1.0
    good = [factor for factor in design.factors if design.is_estimable(factor)]
    pairs = [(factor, low, high) for factor in good for low, high in _pairs(factor)]
    told = (
        uncertainty.simultaneous(found, np.stack([_change(design, *pair) for pair in pairs]), confidence=confidence)
        if pairs
        else []
    )
    made = []
    for factor in design.factors:
        if factor not in good:
            made.append(Effect(factor, (), (), 0.0, is_estimable=False))
            continue
        levels = () if factor.is_slope else range(len(factor.levels))
        of_factor = [
            Change(factor.levels[low], factor.levels[high], each)
            for (one, low, high), each in zip(pairs, told, strict=True)
            if one == factor
        ]
        added = design.component(factor) @ found.means
        made.append(
            Effect(
                factor,
                tuple(uncertainty.interval(found, design.at(factor, level), confidence=confidence) for level in levels),
                tuple(of_factor),
                float((added**2).sum()) / total,
            )
        )
    return sorted(made, key=lambda each: -abs(each.largest.difference.value) if each.is_estimable else 0.0)


def _pairs(factor: Factor) -> list[tuple[int, int]]:
    return (
        [(0, len(factor.levels) - 1)] if factor.is_slope else list(itertools.combinations(range(len(factor.levels)), 2))
    )


def _change(design: Design, factor: Factor, low: int, high: int) -> Numbers:
    """The sum that is the difference between two levels; of a slope, that of one doubling."""
    found = design.at(factor, high) - design.at(factor, low)
    return found / np.log2(factor.levels[high] / factor.levels[low]) if factor.is_slope else found


def matters_more(found: Figures, settings: Sequence[Values], one: Factor, other: Factor, *, confidence: float) -> bool:
    """Whether some difference between levels of one factor is larger than every difference between those of another.

    |a| > |b| is a - b > 0 and a + b > 0, for a > 0: sums as any other. All must be told for one pair of levels; the
    confidence is shared among the pairs that it may be.
    Source: intersection-union test, Berger (1982), https://doi.org/10.1080/00401706.1982.10487790.
    """
    design = Design(settings, factors(settings))
    ours = [_change(design, one, *pair) for pair in _pairs(one)]
    theirs = [_change(design, other, *pair) for pair in _pairs(other)]
    tail = (1 - confidence) / 2 / len(ours)
    for each in ours:
        a = each if found.means @ each > 0 else -each
        sums = np.stack([a + sign * b for b in theirs for sign in (-1, 1)])
        if (np.quantile(found.draws @ sums.T, tail, axis=0) > 0).all():
            return True
    return False


def interplay(found: Figures, settings: Sequence[Values]) -> list[Interplay]:
    """For each two factors how much of the difference between settings is theirs together only, the largest first.

    p_value: of so much by chance, when each factor does the same at every level of the other; corrected by Holm.
    """
    listed = [factor for factor in factors(settings) if not factor.is_slope]
    design = Design(settings, listed)
    total = float(((found.means - found.means.mean()) ** 2).sum()) or 1.0
    rest = design.residual()
    made = []
    for one, other in itertools.combinations(listed, 2):
        products = (_columns(settings, one)[:, :, None] * _columns(settings, other)[:, None, :]).reshape(
            len(settings), -1
        )
        left = rest @ products
        basis, sizes, _ = np.linalg.svd(left, full_matrices=False)
        basis = basis[:, sizes > 1e-9]
        if not basis.shape[1]:
            continue
        seen = float(((basis.T @ found.means) ** 2).sum())
        chance = (((found.draws - found.means) @ basis) ** 2).sum(axis=1)
        made.append(Interplay(one, other, seen / total, float((1 + np.sum(chance >= seen)) / (1 + len(chance)))))
    corrected = holm([each.p_value for each in made])
    told = [replace(each, p_value=p_value) for each, p_value in zip(made, corrected, strict=True)]
    return sorted(told, key=lambda each: -each.share)


def per_doubling(
    found: Figures, settings: Sequence[Values], amounts: Sequence[float], *, confidence: float
) -> Interval | None:
    """What doubling an amount, of training rows for instance, does to the figure, the other factors held.

    None where the amount does not vary, or only together with another factor.

    Args: settings, amounts: (settings), in the order of the figures; an amount in any unit, above 0.
    """
    doublings = np.log2(amounts)
    if np.ptp(doublings) == 0:
        return None
    others = [factor for factor in factors(settings) if not _follows(settings, factor, amounts)]
    matrix = np.column_stack([doublings, Design(settings, others).matrix])
    inverse = np.linalg.pinv(matrix)
    if not np.isclose((inverse @ matrix)[0, 0], 1):
        return None
    return uncertainty.interval(found, inverse[0], confidence=confidence)


def _follows(settings: Sequence[Values], factor: Factor, amounts: Sequence[float]) -> bool:
    """Whether each level has its own amount, so that the factor is the amount."""
    by_level = {(str(values.get(factor.name)), amount) for values, amount in zip(settings, amounts, strict=True)}
    return len(by_level) == len(factor.levels) == len(set(amounts))
