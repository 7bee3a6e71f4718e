"""How often 95% intervals over rows and seeds hold, on tables made with a known truth: docs/comparison.md.

python -m bench.intervals [--trials 400]
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.lib.bootstrap import Numbers
from stages.lib.experiments import uncertainty

SAMPLES = 600


@dataclass(frozen=True)
class Case:
    """Settings that differ in nothing but the noise of their seeds; of_answer: of single answers, per seed."""

    name: str
    of_seed: Sequence[float]
    seeds: int = 3
    of_answer: float = 0.1
    of_row: float = 0.05  # of a setting on a row, whatever the seed


CASES = (
    Case("2 settings, good and bad seeds", [0.05] * 2),
    Case("2 settings, answers change with the seed", [0.02] * 2, of_answer=0.2, of_row=0.1),
    Case("the same, 2 seeds", [0.02] * 2, seeds=2, of_answer=0.2, of_row=0.1),
    Case("the same, 5 seeds", [0.02] * 2, seeds=5, of_answer=0.2, of_row=0.1),
    Case("12 settings, good and bad seeds", [0.05] * 12),
    Case("12 settings, answers change with the seed", [0.02] * 12, of_answer=0.2, of_row=0.1),
    Case("12 settings, only answers change", [0.0] * 12, of_answer=0.2, of_row=0.1),
    Case("12 settings, 1 seed", [0.02] * 12, seeds=1, of_answer=0.2, of_row=0.1),
    Case("12 settings, half with five times the noise, two of those", [0.01] * 6 + [0.05] * 6),
)


def table(case: Case, rng: np.random.Generator, rows: int = 100) -> list[Numbers]:
    hard = rng.normal(0, 0.3, rows)
    return [
        hard
        + rng.normal(0, case.of_row, rows)
        + rng.normal(0, of_seed, (case.seeds, 1))
        + rng.normal(0, case.of_answer, (case.seeds, rows))
        for of_seed in case.of_seed
    ]


def both_with_replacement(one: Numbers, other: Numbers, rng: np.random.Generator) -> bool:
    """Whether the interval contains zero when rows and seeds are both drawn with replacement."""
    drawn = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        rows = rng.integers(one.shape[1], size=one.shape[1])
        seeds = rng.integers(len(one), size=(2, len(one)))
        drawn[sample] = one[seeds[0]][:, rows].mean() - other[seeds[1]][:, rows].mean()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return bool(low <= 0 <= high)


def main() -> None:
    known = argparse.ArgumentParser(prog="bench.intervals")
    known.add_argument("--trials", type=int, default=400)
    trials = known.parse_args().trials
    print("| tables | both drawn with replacement | as here | best not lost | settings kept |\n|---|---|---|---|---|")
    for case in CASES:
        n = len(case.of_seed)
        minus = np.eye(n)[-1] - np.eye(n)[-2]
        plain, here, kept, sizes = [], [], [], []
        for trial in range(trials):
            rng = np.random.default_rng([1, trial])  # not the stream of the draws
            scores = table(case, rng)
            found = uncertainty.figures(scores, np.ones(scores[0].shape[1]), samples=SAMPLES, seed=trial)
            here.append(not uncertainty.interval(found, minus, confidence=0.95).is_told)
            best = uncertainty.best(found, higher_is_better=True, confidence=0.95)
            kept.append(best.is_among(0))
            sizes.append(sum(best.is_among(k) for k in range(n)))
            if n == 2:
                plain.append(both_with_replacement(*scores, rng))
        shown = f"{np.mean(plain):.0%}" if plain else ""
        print(
            f"| {case.name} | {shown} | {np.mean(here):.0%} | {np.mean(kept):.0%} | {np.mean(sizes):.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
