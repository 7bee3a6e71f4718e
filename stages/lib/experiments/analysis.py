"""A sweep judged by one measure: the best setting and those that may be it, what matters, and what would settle it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.lib.experiments import effects, results, uncertainty
from stages.lib.experiments.effects import Effect, Factor, Interplay
from stages.lib.experiments.results import Cost, Measure, Scored, Setting
from stages.lib.experiments.uncertainty import Best, Figures, Interval, Needed
from stages.lib.schema.evaluate import Evaluate

GROWN = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 4))
"""So many times the seeds and the test rows: what could be told then."""


@dataclass(frozen=True)
class Row:
    """One setting. behind: its figure minus the best one's, the interval as wide as is_among asks of all of them."""

    values: dict[str, Any]
    setting: Setting
    figure: Interval
    by_seed: dict[int, float]
    behind: Interval
    p_value: float
    is_among: bool
    is_recommended: bool
    needed: Needed | None
    cost: Cost


@dataclass(frozen=True)
class Analysis:
    """rows: best first. more: pairs of factors of which the first matters more. doubling: of training rows."""

    measure: Measure
    factors: tuple[Factor, ...]
    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]
    more: tuple[tuple[Factor, Factor], ...]
    interplay: tuple[Interplay, ...]
    doubling: Interval | None
    detectable: tuple[tuple[int, int, float], ...]
    figures: Figures
    p: Evaluate

    @property
    def best(self) -> Row:
        return self.rows[0]

    @property
    def among(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_among)

    @property
    def recommended(self) -> Row:
        return next(row for row in self.rows if row.is_recommended)

    @property
    def has_seeds(self) -> bool:
        return self.figures.seeds.freedom > 0


def analyse(settings: Sequence[Setting], tables: Sequence[Sequence[Scored]], measure: Measure, p: Evaluate) -> Analysis:
    """Judge the settings of a sweep by one measure.

    Args: tables: of each setting's trainings, in the order of their seeds. p: bootstrap samples, confidence, seed.
    """
    scores, weights = results.scores(tables, measure)
    found = uncertainty.figures(scores, weights, samples=p.bootstrap_samples, seed=p.seed)
    values = [setting.values for setting in settings]
    listed = effects.factors(values)
    best = uncertainty.best(found, higher_is_better=measure.higher_is_better, confidence=p.confidence)
    costs = [results.cost(setting) for setting in settings]
    among = [k for k in range(len(settings)) if best.is_among(k)]
    sign = -1 if measure.higher_is_better else 1
    chosen = min(among, key=lambda k: (costs[k].flop, costs[k].trainable, sign * found.means[k]))
    made = [
        Row(
            {factor.name: values[k].get(factor.name) for factor in listed},
            settings[k],
            uncertainty.interval(found, np.eye(len(settings))[k], confidence=p.confidence),
            {seed: float(each @ found.shares) for seed, each in zip(settings[k].trainings, scores[k], strict=True)},
            _behind(found, best, k),
            float(best.p_values[k]),
            k in among,
            k == chosen,
            _needed(found, best, k),
            costs[k],
        )
        for k in sorted(range(len(settings)), key=lambda k: (k != best.index, sign * found.means[k]))
    ]
    of_factors = effects.effects(found, values, confidence=p.confidence)
    known = [each.factor for each in of_factors if each.is_estimable]
    return Analysis(
        measure,
        tuple(listed),
        tuple(made),
        tuple(of_factors),
        tuple(
            (one, other)
            for one in known
            for other in known
            if one != other and effects.matters_more(found, values, one, other, confidence=p.confidence)
        ),
        tuple(effects.interplay(found, values)),
        effects.per_doubling(found, values, [setting.rows for setting in settings], confidence=p.confidence),
        tuple(_detectable(found, best)),
        found,
        p,
    )


def _behind(found: Figures, best: Best, k: int) -> Interval:
    """A setting minus the best, as wide as the comparison of this setting with all others asks."""
    value = float(found.means[k] - found.means[best.index])
    if k == best.index:
        return Interval(0.0, 0.0, 0.0)
    reach = float(best.critical[k]) * uncertainty.spread(found, k, best.index)
    return Interval(value, value - reach, value + reach)


def _needed(found: Figures, best: Best, k: int) -> Needed | None:
    """What would tell a setting from the best; None where it is the best, or told already."""
    if k == best.index or not best.is_among(k):
        return None
    return uncertainty.needed(found, k, best.index, critical=float(best.critical[k]))


def _detectable(found: Figures, best: Best) -> list[tuple[int, int, float]]:
    """Times the seeds, times the rows, and the least difference from the best setting that is then told, as a rule."""
    others = [k for k in range(len(found.means)) if k != best.index]
    return [
        (
            seeds,
            rows,
            float(
                np.median(
                    [
                        uncertainty.detectable(found, k, best.index, critical=best.critical[k], seeds=seeds, rows=rows)
                        for k in others
                    ]
                )
            ),
        )
        for seeds, rows in GROWN
        if others
    ]
