"""Figures per arm and measure."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from stages.lib import comparison
from stages.lib.errors import DataError
from stages.lib.measures import OF_JSON, SCORES
from tests.evaluate_settings import settings

SETTINGS = settings(bootstrap_samples=500)
GOOD, BAD = '{"x": "int"}', "The parameters <b>are</b> x & y."


def predictions(answers: dict[str, list[str]], nll: dict[str, float], task: str = "parameters") -> list[dict[str, Any]]:
    """One row per arm and answer; the reference is GOOD, 4 tokens, `nll` nats per token."""
    return [
        {
            "arm": arm,
            "id": f"{task}{number:02}",
            "task": task,
            "source": "numpy",
            "language": "en",
            "length": "short",
            "prompt_sha": "",
            "answer": answer,
            "reference": GOOD,
            "n_tokens": 4,
            "n_bytes": 12,
            "nll": 4 * nll[arm],
            "new_tokens": 3,
            "stops": 1.0,
            "label": None,
            "predicted": None,
            **{name: score(answer, GOOD) for name, score in SCORES.items()},
            "accuracy": None,  # these rows have no label
        }
        for arm, written in answers.items()
        for number, answer in enumerate(written)
    ]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    answers = {"base": [BAD] * 24, "fewshot": [GOOD, BAD] * 12, "tuned": [GOOD] * 23 + [BAD]}
    return predictions(answers, {"base": 3.0, "fewshot": 1.5, "tuned": 0.5})


def test_the_tuned_model_is_compared_with_both_baselines(rows) -> None:
    metrics = comparison.metrics(comparison.compare(rows, SETTINGS))
    assert metrics["test/parameters/field_f1/base"] == 0
    assert metrics["test/parameters/field_f1/fewshot"] == 0.5
    assert metrics["test/parameters/field_f1/tuned"] == metrics["test/parameters/field_f1/delta"] == 23 / 24
    assert metrics["test/parameters/field_f1/delta_fewshot"] == pytest.approx(11 / 24)
    assert 0 < metrics["test/parameters/field_f1/low"] < 23 / 24 < metrics["test/parameters/field_f1/high"] <= 1
    assert metrics["test/parameters/field_f1/low_fewshot"] <= 0.3
    assert metrics["test/parameters/loss/delta"] == pytest.approx(-2.5)
    assert metrics["test/parameters/perplexity/tuned"] == pytest.approx(1.6487, abs=1e-4)


def test_loss_and_perplexity_are_better_when_they_are_lower(rows) -> None:
    lines = {line.measure: line for line in comparison.compare(rows, SETTINGS)}
    assert {lines[name].verdict("base") for name in ("loss", "perplexity", "field_f1")} == {"better"}


def test_a_measure_that_does_not_apply_leaves_no_key(rows) -> None:
    for row in rows:
        row |= dict.fromkeys(OF_JSON)
    lines = comparison.compare(rows, SETTINGS)
    assert not [name for name in comparison.metrics(lines) if "json_valid" in name or "field_f1" in name]
    assert comparison.main_measure(lines, "parameters").measure == "rouge_l"


def test_a_difference_is_told_only_while_the_corrected_sign_test_finds_it() -> None:
    found = comparison.Difference(0.2, 0.1, 0.3, n=10, up=9, down=1, p_value=0.02, p_adjusted=0.04)
    assert found.verdict(higher_is_better=True) == "better"
    assert found.verdict(higher_is_better=False) == "worse"
    assert replace(found, p_adjusted=0.06).verdict(higher_is_better=True) == "cannot tell"
    assert replace(found, low=-0.01).verdict(higher_is_better=True) == "cannot tell"
    assert replace(found, up=1, down=9).verdict(higher_is_better=True) == "cannot tell"  # larger, but on few rows


@pytest.mark.parametrize(("up", "down", "p"), [(5, 0, 2 / 32), (0, 5, 2 / 32), (3, 1, 10 / 16), (0, 0, 1.0)])
def test_the_sign_test_is_exact_and_ties_say_nothing(up: int, down: int, p: float) -> None:
    assert comparison.sign_test(up, down) == pytest.approx(p)


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_never_falls_below_one_before() -> None:
    assert comparison.holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert comparison.holm([]) == []


def test_corrected_sign_tests_find_nothing_among_coins_however_many_are_compared() -> None:
    """Eight tasks, three scores, two baselines, 60 times: uncorrected, most times something would be found."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        coins = rng.integers(2, size=(24, 3, 40))
        gains = [tuned - baseline for *baselines, tuned in coins for baseline in baselines]
        p_values = [comparison.sign_test((gain > 0).sum(), (gain < 0).sum()) for gain in gains]
        found.append((min(p_values) <= 0.05, min(comparison.holm(p_values)) <= 0.05))
    uncorrected, corrected = np.mean(found, axis=0)
    assert uncorrected > 0.5
    assert corrected <= 0.1


def test_an_arm_that_answered_some_rows_is_compared_on_these(rows) -> None:
    some = [row for row in rows if row["arm"] != "fewshot" or row["id"] < "parameters12"]
    line = comparison.main_measure(comparison.compare(some, SETTINGS), "parameters")
    assert line.n == {"base": 24, "fewshot": 12, "tuned": 24}
    assert (line.against["base"].n, line.against["fewshot"].n) == (24, 12)
    assert line.against["fewshot"].delta == 0.5  # of the first twelve rows


def test_two_tables_of_predictions_are_compared_on_the_rows_they_share(rows) -> None:
    earlier = [{**row, **dict.fromkeys(SCORES, 0.0)} for row in rows if row["id"] != "parameters00"]
    (line,) = (line for line in comparison.between(rows, earlier, SETTINGS) if line.measure == "field_f1")
    assert line.n == {"theirs": 23, "ours": 23}
    assert line.against["theirs"].delta == line.arms["ours"] == 22 / 23
    with pytest.raises(DataError, match=r"24 and 0 rows, none of them the same"):
        comparison.between(rows, [], SETTINGS)


def test_slices_show_where_a_model_is_better_and_which_are_too_small_to_say(rows) -> None:
    for row in rows:
        number = int(row["id"][-2:])
        row |= {"source": "few" if number < 3 else "many", "length": "short" if number < 12 else "long"}
    found = {(each.by, each.value): each for each in comparison.slices(rows, SETTINGS) if each.measure == "field_f1"}
    assert list(found) == [("length", "short"), ("length", "long"), ("source", "few"), ("source", "many")]
    assert (found["length", "short"].arms["tuned"], found["length", "long"].arms["tuned"]) == (1, 11 / 12)
    assert found["length", "short"].against["base"].delta == 1
    assert found["source", "few"].is_too_small
    assert found["source", "few"].n["tuned"] == 3
    assert not found["source", "few"].against
    assert not found["source", "many"].is_too_small


def test_classifications_are_judged_by_accuracy_and_have_macro_f1(rows) -> None:
    for row in rows:
        right = row["answer"] == GOOD
        row |= {"label": "a", "predicted": "a" if right else "b", "accuracy": float(right)}
    lines = comparison.compare(rows, SETTINGS)
    (line,) = (line for line in lines if line.measure == "macro_f1")
    assert line.arms["base"] == 0
    assert line.arms["tuned"] == pytest.approx(f1_score(["a"] * 24, ["a"] * 23 + ["b"], average="macro"))
    assert comparison.main_measure([*lines, replace(line, measure="accuracy")], "parameters").measure == "accuracy"
