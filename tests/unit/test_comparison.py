"""Figures per arm and measure."""

from typing import Any

import pytest

from stages.lib import comparison
from stages.lib.measures import SCORES
from stages.lib.schema.evaluate import Evaluate

SETTINGS = Evaluate(
    seed=42,
    fewshot=3,
    batch_size=8,
    max_new_tokens=32,
    answer_margin=8,
    base_16bit=False,
    bootstrap_samples=500,
    confidence=0.95,
)
GOOD, BAD = '{"x": "int"}', "The parameters <b>are</b> x & y."


def predictions(answers: dict[str, list[str]], nll: dict[str, float], task: str = "parameters") -> list[dict[str, Any]]:
    """One row per arm and answer; the reference is GOOD, 4 tokens, `nll` nats per token."""
    return [
        {
            "arm": arm,
            "id": f"{task}{number:02}",
            "task": task,
            "slice": "numpy",
            "prompt_sha": "",
            "answer": answer,
            "reference": GOOD,
            "n_tokens": 4,
            "nll": 4 * nll[arm],
            "new_tokens": 3,
            "stops": 1.0,
            **{name: score(answer, GOOD) for name, score in SCORES.items()},
        }
        for arm, written in answers.items()
        for number, answer in enumerate(written)
    ]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    answers = {"base": [BAD] * 8, "fewshot": [GOOD, BAD] * 4, "tuned": [GOOD] * 7 + [BAD]}
    return predictions(answers, {"base": 3.0, "fewshot": 1.5, "tuned": 0.5})


def test_the_tuned_model_is_compared_with_both_baselines(rows) -> None:
    metrics = comparison.metrics(comparison.compare(rows, SETTINGS))
    assert metrics["test/parameters/field_f1/base"] == 0
    assert metrics["test/parameters/field_f1/fewshot"] == 0.5
    assert metrics["test/parameters/field_f1/tuned"] == metrics["test/parameters/field_f1/delta"] == 7 / 8
    assert metrics["test/parameters/field_f1/delta_fewshot"] == 3 / 8
    assert 0 < metrics["test/parameters/field_f1/low"] < 7 / 8 < metrics["test/parameters/field_f1/high"] <= 1
    assert metrics["test/parameters/field_f1/low_fewshot"] <= 0.125
    assert metrics["test/parameters/loss/delta"] == pytest.approx(-2.5)
    assert metrics["test/parameters/perplexity/tuned"] == pytest.approx(1.6487, abs=1e-4)


def test_loss_and_perplexity_are_better_when_they_are_lower(rows) -> None:
    lines = {line.measure: line for line in comparison.compare(rows, SETTINGS)}
    assert {lines[name].verdict("base") for name in ("loss", "perplexity", "field_f1")} == {"better"}


def test_a_measure_that_does_not_apply_leaves_no_key(rows) -> None:
    for row in rows:
        row |= {"json_valid": None, "field_f1": None}
    lines = comparison.compare(rows, SETTINGS)
    assert not [name for name in comparison.metrics(lines) if "json_valid" in name or "field_f1" in name]
    assert comparison.main_measure(lines, "parameters").measure == "rouge_l"
