"""The paired bootstrap on cases whose answer is known."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from stages.lib import bootstrap

SETTINGS = {"samples": 2000, "confidence": 0.95, "seed": 42}


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    theirs = [0.1, 0.5, 0.3, 0.9]
    found = bootstrap.paired(bootstrap.mean, [[x + 0.25 for x in theirs]], [theirs], **SETTINGS)
    assert (found.delta, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_equal_arms_cannot_be_told_apart() -> None:
    found = bootstrap.paired(bootstrap.mean, [[1, 0, 1, 1]], [[1, 0, 1, 1]], **SETTINGS)
    assert found == bootstrap.Difference(0, 0, 0)


def test_the_interval_is_the_normal_one_for_many_rows() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=1000)
    gains = rng.normal(0.1, 1, size=1000)
    found = bootstrap.paired(bootstrap.mean, [theirs + gains], [theirs], **SETTINGS)
    half = 1.96 * gains.std() / np.sqrt(1000)
    assert found.low == pytest.approx(gains.mean() - half, abs=0.008)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.008)
    assert bootstrap.interval(bootstrap.mean, [gains], **SETTINGS) == pytest.approx((found.low, found.high))


def test_pairing_removes_what_makes_a_row_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, size=100)  # rows differ a hundred times more than the arms do
    found = bootstrap.paired(bootstrap.mean, [theirs + rng.normal(0.1, 0.1, size=100)], [theirs], **SETTINGS)
    assert found.high - found.low < 0.06
    assert found.low > 0


def test_a_ratio_is_over_all_tokens_and_each_arm_has_its_own() -> None:
    assert bootstrap.figure(bootstrap.ratio, [[3.0, 4.0], [3, 1]]) == pytest.approx(7 / 4)
    found = bootstrap.paired(bootstrap.ratio, [[3.0, 4.0], [3, 1]], [[0.0, 0.0], [2, 2]], **SETTINGS)
    assert found.delta == pytest.approx(7 / 4)
    assert (found.low, found.high) == pytest.approx((1, 4))  # rows of one kind only are drawn often among two


@pytest.mark.parametrize("rows", [4, 60])
def test_macro_f1_is_that_of_scikit_learn_for_every_sample(rows: int) -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(5, size=(2, 30, rows))
    expected = [f1_score(a, b, average="macro") for a, b in zip(labels, predicted, strict=True)]
    assert bootstrap.macro_f1(labels, predicted) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval_also_when_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = [[0.21, 0.93, 0.47, 0.35, 0.88]], [[0.12, 0.24, 0.66, 0.31, 0.52]]
    whole = bootstrap.paired(bootstrap.mean, ours, theirs, **SETTINGS)
    monkeypatch.setattr(bootstrap, "ROWS_AT_ONCE", 5 * 7)
    assert bootstrap.paired(bootstrap.mean, ours, theirs, **SETTINGS) == whole
    assert bootstrap.paired(bootstrap.mean, ours, theirs, **SETTINGS | {"seed": 1}) != whole
