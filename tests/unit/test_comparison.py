"""Figures per arm and measure, and how the page words them."""

import re
from typing import Any

import pytest

from stages.lib import comparison, evaluation_page
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


CALLING = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look_up"}}]}


def page(rows: list[dict[str, Any]]) -> str:
    lines = comparison.compare(rows, SETTINGS)
    return evaluation_page.render(
        lines,
        rows,
        comparison.metrics(lines) | {"test/parameters/loss/base_16bit": 1.25},
        questions={
            row["id"]: [{"role": "user", "content": "Which </pre><script> parameters?"}, CALLING] for row in rows
        },
        limits={task: 20 for task in {row["task"] for row in rows}},
        curve=[
            {"step": "0", "loss": "2.0", "val_loss": "2.1"},
            {"step": "1", "loss": "1.5", "val_loss": "2.1"},
            {"step": "2", "loss": "1.0", "val_loss": "1.2"},
        ],
        counts={"duplicates/exact": 683, "duplicates/near": 111, "rows/in": 7013, "rows/train": 440},
        model="a/model",
        p=SETTINGS,
    )


def test_the_page_says_the_verdict_first_in_one_sentence(rows) -> None:
    heading = re.search(r"<h1>(.*?)</h1>", page(rows), re.DOTALL)
    assert heading is not None
    assert heading[1].startswith(
        "On parameters, the tuned model is better than the base model, with and without examples"
    )
    assert heading[1].count(". ") == 0


def test_a_turn_that_only_calls_a_tool_is_shown(rows) -> None:
    assert "look_up" in page(rows)


def test_without_a_sure_difference_the_page_does_not_claim_one(rows) -> None:
    arms = ("base", "fewshot", "tuned")
    same = predictions({arm: [GOOD, BAD] for arm in arms}, dict.fromkeys(arms, 1.0))
    html = page(same)
    assert "cannot be told from the base model" in html
    assert 'class="chip cannot-tell"' in html
    assert 'class="chip better"' not in html


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(rows) -> None:
    html = page(rows)
    assert not re.search(r"https?://|<script|<link|@import|url\(|<img|<iframe", html)
    assert "&lt;/pre&gt;&lt;script&gt;" in html  # what a row holds is text, never markup
    assert "&lt;b&gt;" in html


def test_equal_inputs_give_an_equal_page_and_order_of_rows_does_not_matter(rows) -> None:
    assert page(rows) == page(rows[::-1])


def test_counts_of_rows_and_duplicates_stand_on_the_page(rows) -> None:
    html = page(rows)
    for text in ("8 held-out rows", "683 exact", "111 near", "440 rows", "a loss of 1.250 nats"):
        assert text in html


def test_differences_mark_what_the_answer_adds_and_leaves_out() -> None:
    found = evaluation_page.differences('{"x": "float"}', GOOD)
    assert [(piece.kind, piece.text) for piece in found] == [
        ("same", '{"x": "'),
        ("missing", "int"),
        ("extra", "float"),
        ("same", '"}'),
    ]
    assert [piece.kind for piece in evaluation_page.differences(GOOD, GOOD)] == ["same"]
    assert [piece.kind for piece in evaluation_page.differences("", GOOD)] == ["missing"]


def test_the_worst_errors_come_first(rows) -> None:
    lines = comparison.compare(rows, SETTINGS)
    cards = evaluation_page.side_by_side(rows)
    assert evaluation_page.worst(cards, lines)[0]["id"] == "parameters07"


def test_validation_points_stand_where_the_validation_loss_was_measured(rows) -> None:
    curve = evaluation_page.training_curve(
        [{"step": str(step), "loss": "1.0", "val_loss": "2.0" if step < 3 else "1.0"} for step in range(5)]
    )
    assert len(curve["series"]["validation"]["dots"]) == 2
    assert curve["series"]["validation"]["dots"][1][0] == 44 + 580 * 3 / 4
    assert curve["last_step"] == 4
