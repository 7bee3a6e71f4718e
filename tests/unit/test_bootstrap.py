"""The paired bootstrap on cases whose answer is known."""

import numpy as np
import pytest

from stages.lib import bootstrap

SETTINGS = {"samples": 2000, "confidence": 0.95, "seed": 42}


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    theirs = [0.1, 0.5, 0.3, 0.9]
    found = bootstrap.paired([x + 0.25 for x in theirs], theirs, [1, 1, 1, 1], **SETTINGS)
    assert (found.delta, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.verdict(higher_is_better=True) == "better"
    assert found.verdict(higher_is_better=False) == "worse"


def test_equal_arms_cannot_be_told_apart() -> None:
    found = bootstrap.paired([1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], **SETTINGS)
    assert found == bootstrap.Difference(0, 0, 0)
    assert found.verdict(higher_is_better=True) == "cannot tell"


def test_the_interval_is_the_normal_one_for_many_rows() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=1000)
    gains = rng.normal(0.1, 1, size=1000)
    found = bootstrap.paired(theirs + gains, theirs, np.ones(1000), **SETTINGS)
    half = 1.96 * gains.std() / np.sqrt(1000)
    assert found.low == pytest.approx(gains.mean() - half, abs=0.008)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.008)


def test_pairing_removes_what_makes_a_row_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, size=100)  # rows differ a hundred times more than the arms do
    found = bootstrap.paired(theirs + rng.normal(0.1, 0.1, size=100), theirs, np.ones(100), **SETTINGS)
    assert found.high - found.low < 0.06
    assert found.verdict(higher_is_better=True) == "better"


def test_weights_make_loss_a_mean_over_tokens_not_over_rows() -> None:
    assert bootstrap.mean([1.0, 4.0], [3, 1]) == pytest.approx(7 / 4)
    found = bootstrap.paired([1.0, 4.0], [0.0, 0.0], [3, 1], **SETTINGS)
    assert found.delta == pytest.approx(7 / 4)
    assert (found.low, found.high) == pytest.approx((1, 4))  # rows of one kind only are drawn often among two


def test_a_transform_is_applied_to_the_means_of_each_resample() -> None:
    found = bootstrap.paired([2.0, 2.0], [1.0, 1.0], [1, 1], **SETTINGS, transform=np.exp)
    assert found.delta == pytest.approx(np.e**2 - np.e)


def test_the_same_seed_gives_the_same_interval_also_when_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = [0.21, 0.93, 0.47, 0.35, 0.88], [0.12, 0.24, 0.66, 0.31, 0.52]
    whole = bootstrap.paired(ours, theirs, [1] * 5, **SETTINGS)
    monkeypatch.setattr(bootstrap, "ROWS_AT_ONCE", 5 * 7)
    assert bootstrap.paired(ours, theirs, [1] * 5, **SETTINGS) == whole
    assert bootstrap.paired(ours, theirs, [1] * 5, **SETTINGS | {"seed": 1}) != whole
