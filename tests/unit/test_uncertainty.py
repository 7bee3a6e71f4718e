"""Rows and seeds as noise: on tables made here, whose truth is known, intervals must hold as often as they say."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from stages.lib.bootstrap import Numbers
from stages.lib.experiments import uncertainty
from stages.lib.experiments.uncertainty import Figures


def sweeps(
    trials: int,
    truth: Sequence[float],
    *,
    seeds: int = 3,
    rows: int = 60,
    of_seed: float = 0.05,
    of_answer: float = 0.1,
) -> Iterator[list[Numbers]]:
    """Scores as sweeps give them: rows hard or easy for all, seeds good or bad on all rows, answers by chance."""
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        hard = rng.normal(0, 0.3, rows)
        yield [
            mean + hard + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_answer, (seeds, rows)) for mean in truth
        ]


def figures(scores: Sequence[Numbers], samples: int = 300) -> Figures:
    return uncertainty.figures(scores, np.ones(scores[0].shape[1]), samples=samples, seed=1)


def test_an_interval_over_three_seeds_holds_as_often_as_it_says() -> None:
    minus = np.array([-1.0, 1.0])
    found = [uncertainty.interval(figures(each), minus, confidence=0.95) for each in sweeps(200, (0.5, 0.6))]
    assert 0.91 <= np.mean([each.low <= 0.1 <= each.high for each in found]) <= 0.99


def test_intervals_of_many_differences_hold_together() -> None:
    pairs = np.array([[-1.0, 1, 0, 0], [-1, 0, 1, 0], [-1, 0, 0, 1], [0, -1, 1, 0], [0, -1, 0, 1], [0, 0, -1, 1]])
    wrong = [
        any(each.is_told for each in uncertainty.simultaneous(figures(scores), pairs, confidence=0.95))
        for scores in sweeps(150, [0.5] * 4)
    ]
    assert np.mean(wrong) <= 0.1


def test_the_truly_best_is_among_those_not_told_from_the_best_and_a_bad_one_is_not() -> None:
    found = [
        uncertainty.best(figures(scores), higher_is_better=True, confidence=0.95)
        for scores in sweeps(120, (0.60, 0.59, 0.58, 0.58, 0.30))
    ]
    assert np.mean([each.is_among(0) for each in found]) >= 0.9
    assert np.mean([each.is_among(4) for each in found]) <= 0.05


def test_a_setting_that_is_as_much_worse_on_every_row_is_told_from_the_best() -> None:
    found = figures([np.ones((1, 32)), np.zeros((1, 32)), np.ones((1, 32))])
    best = uncertainty.best(found, higher_is_better=True, confidence=0.95)
    assert [best.is_among(k) for k in range(3)] == [True, False, True]
    behind = uncertainty.simultaneous(found, np.array([[-1.0, 1, 0], [-1, 0, 1]]), confidence=0.95)
    assert [each.is_told for each in behind] == [True, False]


def test_the_best_is_the_lowest_where_lower_is_better() -> None:
    scores = [np.full((2, 30), value) + np.linspace(0, 1, 30) for value in (0.5, 0.2)]
    found = uncertainty.best(figures(scores), higher_is_better=False, confidence=0.95)
    assert (found.index, found.is_among(0), found.is_among(1)) == (1, False, True)


def test_answers_that_change_with_the_seed_are_not_taken_for_good_and_bad_seeds() -> None:
    found = [
        uncertainty.seed_noise(scores, np.full(100, 0.01))
        for scores in sweeps(40, [0.5] * 6, rows=100, of_seed=0.0, of_answer=0.3)
    ]
    assert np.mean([each.on_rows for each in found]) == pytest.approx(0.3**2 / 100, rel=0.05)
    assert np.mean([each.own for each in found]) < 0.3 * 0.3**2 / 100
    assert found[0].freedom == 12


def test_settings_that_never_answer_right_do_not_make_the_others_look_surer() -> None:
    scores = next(sweeps(1, [0.5] * 3))
    shares = np.full(60, 1 / 60)
    assert uncertainty.seed_noise([*scores, np.zeros((3, 60))], shares) == uncertainty.seed_noise(scores, shares)


def test_of_one_seed_each_nothing_is_known_of_seeds() -> None:
    found = figures(next(sweeps(1, (0.5, 0.6), seeds=1)))
    assert found.seeds == uncertainty.Seeds(0.0, 0.0, 0)


def test_equal_answers_cannot_be_told_apart() -> None:
    same = np.tile(np.linspace(0, 1, 20), (3, 1))
    found = figures([same, same])
    assert uncertainty.best(found, higher_is_better=True, confidence=0.95).is_among(1)
    assert not uncertainty.interval(found, np.array([-1.0, 1.0]), confidence=0.95).is_told


def test_a_loss_is_weighted_by_tokens() -> None:
    found = uncertainty.figures([np.array([[1.0, 3.0]])], np.array([30.0, 10.0]), samples=10, seed=1)
    assert found.means[0] == pytest.approx(1.5)


def test_with_the_seeds_that_are_needed_the_difference_is_just_detectable() -> None:
    found = figures(next(sweeps(1, (0.5, 0.52), rows=400)))
    seen = abs(found.means[1] - found.means[0])
    asked = uncertainty.needed(found, 1, 0, critical=2.0)
    assert asked.seeds is not None
    assert asked.seeds > 3
    enough, fewer = (
        uncertainty.detectable(found, 1, 0, critical=2.0, seeds=seeds / 3) for seeds in (asked.seeds, asked.seeds - 1)
    )
    assert enough <= seen < fewer


def test_what_is_not_told_needs_more_than_there_is() -> None:
    for scores in sweeps(20, (0.5, 0.56), seeds=2):
        found = figures(scores)
        best = uncertainty.best(found, higher_is_better=True, confidence=0.95)
        other = 1 - best.index
        if best.is_among(other):
            asked = uncertainty.needed(found, other, best.index, critical=float(best.critical[other]))
            assert asked.seeds is None or asked.seeds > 2
            assert asked.rows is None or asked.rows > 60


def test_no_number_of_rows_settles_what_seeds_alone_leave_open() -> None:
    found = figures(next(sweeps(1, (0.5, 0.51), of_seed=0.2)))
    assert uncertainty.needed(found, 1, 0, critical=2.0).rows is None


def test_settings_with_unequal_noise_of_seeds_are_noticed() -> None:
    assert uncertainty.equal_noise([[0.50, 0.501, 0.499]] * 6 + [[0.3, 0.5, 0.7]]) < 0.01
    assert uncertainty.equal_noise([[0.5, 0.52, 0.48], [0.6, 0.63, 0.58]]) > 0.5
