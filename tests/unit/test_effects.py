"""Main effects of a sweep's keys, on figures without noise or with noise of a known size."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from stages.lib.experiments import effects, uncertainty
from stages.lib.experiments.effects import Values
from stages.lib.experiments.uncertainty import Figures

GRID = [{"r": r, "modules": m} for r, m in itertools.product((2, 8, 32), ("all", "attention"))]


def figures(settings: Sequence[Values], truth: Callable[[Any], float], noise: float = 1e-6) -> Figures:
    """Three seeds, 50 rows."""
    rng = np.random.default_rng(0)
    scores = [truth(each) + noise * rng.normal(0, 1, (3, 1)) + noise * rng.normal(0, 1, (3, 50)) for each in settings]
    return uncertainty.figures(scores, np.ones(50), samples=500, seed=1)


def layers(values: Any) -> float:
    return 0.5 + 0.1 * (values["modules"] == "all")


def by_name(found: Figures, settings: Sequence[Values]) -> dict[str, effects.Effect]:
    return {each.factor.name: each for each in effects.effects(found, settings, confidence=0.95)}


def test_in_a_full_grid_an_effect_is_the_difference_of_plain_averages() -> None:
    settings = [{"r": 2, "m": "a"}, {"r": 8, "m": "a"}, {"r": 2, "m": "b"}, {"r": 8, "m": "b"}]
    factor = effects.factors(settings)[1]
    design = effects.Design(settings, effects.factors(settings))
    assert factor.keys == ("r",)
    assert design.at(factor, 1) - design.at(factor, 0) == pytest.approx([-0.5, 0.5, -0.5, 0.5])
    assert design.at(factor, 0) == pytest.approx([0.5, 0, 0.5, 0])


def test_the_key_that_matters_is_told_and_the_other_is_bounded() -> None:
    found = figures(GRID, layers, noise=0.02)
    told = by_name(found, GRID)
    assert told["modules"].changes[0].difference.value == pytest.approx(-0.1, abs=0.03)
    assert (told["modules"].is_told, told["r"].is_told) == (True, False)
    assert 0 < told["r"].bound < 0.1
    assert list(told) == ["modules", "r"]


def test_which_key_matters_more_is_told_only_where_it_is_sure() -> None:
    r, modules = sorted(effects.factors(GRID), key=lambda factor: factor.name, reverse=True)
    for noise, is_sure in ((0.02, True), (0.3, False)):
        found = figures(GRID, layers, noise=noise)
        assert effects.matters_more(found, GRID, modules, r, confidence=0.95) is is_sure
        assert not effects.matters_more(found, GRID, r, modules, confidence=0.95)


def test_a_missing_point_does_not_bend_the_effects() -> None:
    found = by_name(figures(GRID[1:], lambda each: layers(each) + 0.01 * each["r"]), GRID[1:])
    assert found["modules"].changes[0].difference.value == pytest.approx(-0.1, abs=1e-4)
    assert found["r"].largest.difference.value == pytest.approx(0.3, abs=1e-4)


def test_keys_that_always_change_together_are_one_factor() -> None:
    found = effects.factors([{"r": 2, "alpha": 4, "x": 1}, {"r": 8, "alpha": 16, "x": 1}])
    assert [(each.keys, each.levels) for each in found] == [(("r", "alpha"), (2, 8))]


def test_what_the_points_cannot_tell_apart_is_said_so() -> None:
    settings = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 3}]  # a is known as soon as b is
    assert not any(each.is_estimable for each in by_name(figures(settings, lambda each: each["b"]), settings).values())


def test_a_number_with_many_values_is_told_by_its_slope() -> None:
    settings = [{"rate": 0.1 * 2**k} for k in range(8)]
    found = by_name(figures(settings, lambda each: 0.05 * np.log2(each["rate"])), settings)
    assert found["rate"].largest.difference.value == pytest.approx(0.05, abs=1e-4)


def test_what_two_keys_do_only_together_is_found() -> None:
    def crossed(values: Any) -> float:
        return layers(values) + 0.2 * (values["modules"] == "all") * (values["r"] == 32)

    together, apart = (effects.interplay(figures(GRID, truth, noise=0.02), GRID)[0] for truth in (crossed, layers))
    assert together.p_value < 0.01
    assert together.share > 0.1
    assert apart.p_value > 0.05


def test_twice_the_data_is_told_with_the_other_keys_held() -> None:
    settings = [{"fraction": f, "m": m} for f, m in itertools.product((0.25, 0.5, 1.0), "ab")]
    found = figures(settings, lambda each: 0.03 * np.log2(each["fraction"]) + 0.2 * (each["m"] == "a"))
    told = effects.per_doubling(found, settings, [400 * each["fraction"] for each in settings], confidence=0.95)
    assert told is not None
    assert told.value == pytest.approx(0.03, abs=1e-4)
    assert effects.per_doubling(found, settings, [400] * 6, confidence=0.95) is None
