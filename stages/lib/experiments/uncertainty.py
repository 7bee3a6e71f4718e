"""How sure the figures of several settings are, each trained with several seeds and scored on the same test rows.

Two things are drawn at random: the test rows, the same for all settings, and the seeds of each setting.

    scores (settings, seeds, rows)  ->  means (settings)  and  draws (samples, settings): figures that might have been

A draw takes rows with replacement, for all settings at once, so that what makes a row hard for all of them cancels
out, and trains each setting anew with the noise of seeds that all settings show together. Seeds themselves are not
drawn with replacement: three of them have ten samples, whose intervals are too narrow, and answers that change with
the seed would be counted with the rows and with the seeds.
Source: rows and seeds as crossed random effects, Owen (2007), https://doi.org/10.1214/07-AOAS122.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bartlett, norm

from stages.lib.bootstrap import Numbers

POWER = 0.8  # chance of telling a difference of the size that was seen


@dataclass(frozen=True)
class Seeds:
    """Variances of one training's figure over seeds, pooled over the settings with several of them.

    own: what remains on endlessly many rows. on_rows: because single answers change; falls with the number of rows.
    freedom: degrees of freedom of both; 0 where no setting has two seeds, and nothing is known of seeds.
    """

    own: float
    on_rows: float
    freedom: int

    @property
    def sd(self) -> float:
        """Standard deviation of a figure over seeds on these rows."""
        return math.sqrt(self.own + self.on_rows)


@dataclass(frozen=True)
class Figures:
    """means: (settings). draws: (samples, settings). n_seeds: (settings). rows: each setting's mean over seeds by row,
    (settings, rows). shares: of the rows in a figure, sum 1."""

    means: Numbers
    draws: Numbers
    seeds: Seeds
    n_seeds: Numbers
    rows: Numbers
    shares: Numbers


@dataclass(frozen=True)
class Interval:
    """A difference, or any other weighted sum of figures; told: zero is outside."""

    value: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        return self.low > 0 or self.high < 0

    def verdict(self, *, higher_is_better: bool) -> str:
        """`better`, `worse` or `cannot tell`."""
        if not self.is_told:
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Best:
    """index: the best figure. p_values: (settings), of being as good as any other, corrected for all comparisons.
    critical: (settings), the distance in standard errors from which a setting counts as worse than some other."""

    index: int
    p_values: Numbers
    critical: Numbers
    confidence: float

    def is_among(self, setting: int) -> bool:
        """Whether a setting cannot be told from the best."""
        return bool(self.p_values[setting] > 1 - self.confidence)


def figures(scores: Sequence[Numbers], weights: Numbers, *, samples: int, seed: int) -> Figures:
    """Weighted means over rows of each setting, averaged over its seeds.

    Args: scores: of each setting, (its seeds, rows). weights: of rows; tokens for a loss per token, else ones.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    rows = np.stack([each.mean(axis=0) for each in scores])
    n_seeds = np.array([len(each) for each in scores], np.float64)
    found = seed_noise(scores, shares)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(shares), np.full(len(shares), 1 / len(shares)), size=samples) * shares
    draws = drawn @ rows.T / drawn.sum(axis=1, keepdims=True)
    if found.freedom:
        # a variance known from few seeds is itself drawn: the intervals get the tails of Student's t
        total = (found.own + found.on_rows) * found.freedom / rng.chisquare(found.freedom, samples)
        own = np.sqrt(np.maximum(0, total - found.on_rows))
        draws = draws + own[:, None] * rng.standard_normal(draws.shape) / np.sqrt(n_seeds)
    return Figures(rows @ shares, draws, found, n_seeds, rows, shares)


def seed_noise(scores: Sequence[Numbers], shares: Numbers) -> Seeds:
    """The noise of seeds, from how each setting's trainings differ from their mean.

    Rows on which single answers change add to it as they would to any mean over rows; that part is taken out. A setting
    whose trainings all have one figure, such as zero, says nothing of how the others vary and is left out.
    """
    several = [each - each.mean(axis=0) for each in scores if len(each) > 1]
    several = [each for each in several if np.ptp(each @ shares) > 0] or several
    freedom = sum(len(each) - 1 for each in several)
    if not freedom:
        return Seeds(0.0, 0.0, 0)
    off = np.concatenate([each @ shares for each in several])  # of each training from its setting's mean
    rest = np.concatenate(several) - off[:, None]
    n_rows = len(shares)
    on_rows = float((shares**2 * rest**2).sum()) / freedom * n_rows / max(1, n_rows - 1)
    return Seeds(max(0.0, float(off @ off) / freedom - on_rows), on_rows, freedom)


def equal_noise(trainings: Sequence[Sequence[float]]) -> float:
    """p-value of settings whose figures differ between seeds as unequally as these, all having one noise (Bartlett)."""
    several = [each for each in trainings if len(each) > 1 and np.ptp(each) > 0]
    return float(bartlett(*several).pvalue) if len(several) > 1 else 1.0


def interval(found: Figures, weights: Numbers, *, confidence: float) -> Interval:
    """The percentile interval of a weighted sum of settings' figures."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(found.draws @ weights, [tail, 1 - tail])
    return Interval(float(found.means @ weights), float(low), float(high))


def simultaneous(found: Figures, sums: Numbers, *, confidence: float) -> list[Interval]:
    """Intervals of several weighted sums, (sums, settings), that hold all together with this confidence."""
    centred, scale = _scaled((found.draws - found.means) @ sums.T)
    reach = float(np.quantile(np.abs(centred).max(axis=1), confidence)) * scale
    values = found.means @ sums.T
    return [
        Interval(float(value), float(value - far), float(value + far)) for value, far in zip(values, reach, strict=True)
    ]


def best(found: Figures, *, higher_is_better: bool, confidence: float) -> Best:
    """The best setting, and those that may as well be the best one.

    A setting is out when it lies behind some other farther than the largest of all its distances would by chance. The
    truly best setting is therefore out with a chance of 1 - confidence at most, however many there are, and whichever
    of them happened to come first.
    Source: Hsu (1984), https://doi.org/10.1214/aos/1176346708.
    """
    sign = 1 if higher_is_better else -1
    means, off = sign * found.means, sign * (found.draws - found.means)
    p_values, critical = np.ones(len(means)), np.zeros(len(means))
    for k in range(len(means)) if len(means) > 1 else ():
        others = np.arange(len(means)) != k
        chance, scale = _scaled(off[:, others] - off[:, [k]])
        gap = means[others] - means[k]
        ahead = np.divide(gap, scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0)  # the same on every row
        largest = chance.max(axis=1)
        p_values[k] = (1 + np.sum(largest >= ahead.max())) / (1 + len(largest))
        critical[k] = np.quantile(largest, confidence)
    return Best(int(np.argmax(means)), p_values, critical, confidence)


def spread(found: Figures, one: int, other: int) -> float:
    """The standard error of a difference between two settings, as `best` measures distances."""
    return float(_scaled((found.draws[:, one] - found.draws[:, other])[:, None])[1][0])


def _scaled(drawn: Numbers) -> tuple[Numbers, Numbers]:
    """Columns over half their central 95%, as that of a standard normal, and these scales; constant columns are 0.

    Of few seeds the draws have such tails that their standard deviation says little.
    """
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    scale = (high - low) / (2 * norm.ppf(0.975))
    return np.divide(drawn, scale, out=np.zeros_like(drawn), where=scale > 0), scale


@dataclass(frozen=True)
class Needed:
    """What would settle a difference of the size seen: seeds of each setting, or test rows; None: no number would."""

    seeds: int | None
    rows: int | None


def needed(found: Figures, one: int, other: int, *, critical: float) -> Needed:
    """How many seeds, or rows, tell two settings apart with a chance of POWER, when their difference is the one seen.

    Args: critical: standard errors from which a difference counts as told, see Best.
    """
    variance, of_seeds, n_rows = _parts(found, one, other)
    seeds = int(max(found.n_seeds[one], found.n_seeds[other]))
    allowed = ((found.means[one] - found.means[other]) / (critical + norm.ppf(POWER))) ** 2
    allowed /= _tails(found, one, other)
    by_seed = of_seeds * (found.seeds.own + found.seeds.on_rows)
    of_rows = max(0.0, variance - of_seeds * found.seeds.on_rows)  # what no further seed takes away
    left_for_rows = allowed - of_seeds * found.seeds.own
    return Needed(
        math.ceil(seeds * max(1.0, by_seed / (allowed - of_rows))) if allowed > of_rows else None,
        math.ceil(n_rows * max(1.0, variance / left_for_rows)) if left_for_rows > 0 else None,
    )


def detectable(found: Figures, one: int, other: int, *, critical: float, seeds: float = 1, rows: float = 1) -> float:
    """The least difference that would be told with a chance of POWER, with so many times the seeds and rows."""
    variance, of_seeds, _ = _parts(found, one, other)
    of_rows = max(0.0, variance - of_seeds * found.seeds.on_rows)
    each = of_seeds / seeds
    total = (of_rows + each * found.seeds.on_rows) / rows + each * found.seeds.own
    return float((critical + norm.ppf(POWER)) * math.sqrt(total * _tails(found, one, other)))


def _tails(found: Figures, one: int, other: int) -> float:
    """How much wider than by its variances a difference spreads, since few seeds leave these themselves unsure."""
    variance, of_seeds, _ = _parts(found, one, other)
    total = variance + of_seeds * found.seeds.own
    return max(1.0, spread(found, one, other) ** 2 / total) if total > 0 else 1.0


def _parts(found: Figures, one: int, other: int) -> tuple[float, float, int]:
    """Variance of a difference over rows; how often a training's variance is in it; number of rows."""
    off = found.rows[one] - found.rows[other] - (found.means[one] - found.means[other])
    n_rows = len(found.shares)
    variance = float((found.shares**2 * off**2).sum()) * n_rows / max(1, n_rows - 1)
    return variance, float(1 / found.n_seeds[one] + 1 / found.n_seeds[other]), n_rows
