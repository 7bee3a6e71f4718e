"""How the evaluation page words and draws what was found."""

import re
from typing import Any

import pytest

from stages.lib import comparison, evaluation_page, ratings
from stages.lib.measures import SCORES, classification
from tests.evaluate_settings import settings

SETTINGS = settings(bootstrap_samples=100)
GOOD, BAD = '{"x": "int"}', "The parameters <b>are</b> x & y."


def prediction(arm: str, number: int, answer: str, task: str = "parameters", **changes: Any) -> dict[str, Any]:
    """An answer whose reference is GOOD; every score is 1 where they are equal, else 0."""
    found = {
        "arm": arm,
        "id": f"{task}{number:02}",
        "task": task,
        "source": "numpy",
        "language": "en",
        "length": ("short", "long")[number % 2],
        "prompt_sha": "",
        "answer": answer,
        "reference": GOOD,
        "n_tokens": 4,
        "n_bytes": 12,
        "nll": {"base": 12.0, "fewshot": 6.0, "tuned": 2.0}.get(arm, 4.0),
        "new_tokens": 3,
        "stops": 1.0,
        "label": None,
        "predicted": None,
        **dict.fromkeys(SCORES, float(answer == GOOD)),
    }
    return found | {"accuracy": None} | changes


def answered(task: str = "parameters", **right: int) -> list[dict[str, Any]]:
    """20 rows of each arm, of which so many first ones are right."""
    return [
        prediction(arm, number, GOOD if number < count else BAD, task)
        for arm, count in right.items()
        for number in range(20)
    ]


def page(rows: list[dict[str, Any]], **changes: Any) -> str:
    lines = comparison.compare(rows, SETTINGS)
    calling = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look_up"}}]}
    turns = [{"role": "user", "content": "Which </pre><script> parameters?"}, calling]
    curve = [
        {"step": "0", "loss": "2.0", "val_loss": "2.1", "learning_rate": "0.1"},
        {"step": "1", "loss": "1.5", "val_loss": "", "learning_rate": "0.05"},
        {"step": "2", "loss": "1.0", "val_loss": "1.2", "learning_rate": "0"},
    ]
    given = {
        "questions": {row["id"]: turns for row in rows},
        "limits": {row["task"]: 20 for row in rows},
        "curve": curve,
        "counts": {"duplicates/exact": 683, "duplicates/near": 111, "rows/in": 7013, "rows/train": 440},
        "model": "a/model",
        "p": SETTINGS,
        "slices": comparison.slices(rows, SETTINGS),
    }
    metrics = {"test/parameters/loss/base_16bit": 1.25}
    return evaluation_page.render(lines, rows, metrics, **(given | changes))


def verdict(rows: list[dict[str, Any]]) -> str:
    return evaluation_page.verdict(comparison.compare(rows, SETTINGS))


def forgetting(nll: float) -> list[comparison.Line]:
    """Lines of general text: the base takes 3 nats for a token, the tuned model `nll`."""
    rows = [
        {"arm": arm, "id": str(number), "task": "general", "nll": value, "n_tokens": 1, "n_bytes": 4}
        for arm, value in (("base", 3.0), ("tuned", nll))
        for number in range(20)
    ]
    return comparison.compare(rows, SETTINGS, measures=("perplexity", "bits_per_byte"))


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ({"base": 0, "fewshot": 6, "tuned": 20}, "is better than the base model and than few-shot prompting on"),
        (
            {"base": 0, "fewshot": 19, "tuned": 20},
            "is better than the base model, but is not shown to be better than few-shot prompting on",
        ),
        (
            {"base": 0, "fewshot": 20, "tuned": 9},
            "is better than the base model, but is not better than few-shot prompting but worse on",
        ),
        ({"base": 5, "fewshot": 5, "tuned": 5}, "cannot be told from the base model nor from few-shot prompting on"),
        ({"base": 20, "fewshot": 20, "tuned": 3}, "is worse than the base model and than few-shot prompting on"),
    ],
)
def test_the_verdict_says_what_the_figures_allow(right: dict[str, int], said: str) -> None:
    assert said in verdict(answered(**right))


def test_the_verdict_gives_figures_and_interval_and_tasks_alike_share_a_clause() -> None:
    rows = answered("a", base=0, fewshot=6, tuned=20) + answered("b", base=0, fewshot=6, tuned=20)
    text = verdict(rows)
    assert re.search(
        r"on a \(field F1 1\.00 against 0\.30, difference \+0\.70 \[\+0\.\d\d, \+0\.\d\d\]\) and on b \(", text
    )
    assert text.count("better") == 1


def test_a_verdict_that_the_sign_test_withholds_says_so() -> None:
    text = verdict(answered(base=0, fewshot=15, tuned=20))
    assert "is not shown to be better than few-shot prompting" in text
    assert re.search(r"difference \+0\.25 \[\+0\.\d\d, \+0\.\d\d\], but p 0\.\d+ by the corrected sign test\)", text)


@pytest.mark.parametrize(
    ("nll", "said"),
    [
        (3.1, "general text is partly forgotten (perplexity 22.2 against 20.1, +10.5%)."),
        (3.0, "no forgetting of general text can be told (perplexity 20.1 against 20.1, 0.00%)."),
        (2.9, "general text is not forgotten (perplexity 18.2 against 20.1, \N{MINUS SIGN}9.5%)."),
    ],
)
def test_the_verdict_says_whether_general_text_was_forgotten(nll: float, said: str) -> None:
    rows = answered(base=0, fewshot=6, tuned=20)
    assert evaluation_page.verdict(comparison.compare(rows, SETTINGS), forgetting(nll)).endswith(f"; {said}")
    assert "<h2>General text</h2>" in page(rows, forgetting=forgetting(nll))


def test_an_arm_that_answered_some_rows_only_is_compared_on_these() -> None:
    rows = [
        row for row in answered(base=0, fewshot=0, tuned=20) if row["arm"] != "fewshot" or row["id"] < "parameters12"
    ]
    assert "difference on the same 12 rows +1.00" in verdict(rows)
    assert "12 rows" in page(rows)
    few = [row for row in answered(base=0, fewshot=0, tuned=20) if row["arm"] != "tuned" or row["id"] < "parameters12"]
    assert "12 held-out rows of parameters" in page(few)


def test_another_model_that_was_named_has_its_column_and_its_place_in_the_verdict() -> None:
    rows = answered(base=0, earlier=19, fewshot=6, tuned=20)
    assert "cannot be told from earlier" in verdict(rows)
    assert "<th>Against earlier</th>" in page(rows)


@pytest.mark.parametrize(
    ("answer", "changes", "kind"),
    [
        (GOOD, {}, None),
        (" ", {}, "empty"),
        ("and so on " * 20, {"stops": 0.0}, "repeats itself"),
        (BAD, {"stops": 0.0}, "not stopped"),
        (BAD, {}, "invalid JSON"),
        ("{}", {}, "missing fields"),
        ('{"x": "int", "y": "int"}', {}, "extra fields"),
        ('{"x": "float"}', {}, "wrong values"),
        (BAD, {"json_valid": None, "rouge_l": 0.1}, "little in common"),
        (BAD, {"json_valid": None, "rouge_l": 0.6}, None),
        (BAD, {"label": "a", "predicted": "b"}, "wrong label"),
        (BAD, {"label": "a", "predicted": "a"}, None),
    ],
)
def test_each_failure_has_one_name(answer: str, changes: dict[str, Any], kind: str | None) -> None:
    assert evaluation_page.failure(prediction("tuned", 0, answer, **changes)) == kind
    assert kind is None or kind in evaluation_page.FAILURES


def test_failures_are_counted_by_kind_and_arm_and_the_worst_of_each_come_first() -> None:
    rows = answered(base=0, fewshot=6, tuned=16)
    rows[-1]["nll"] = 40.0  # of the tuned model's four failures the most surprised
    lines = comparison.compare(rows, SETTINGS)
    cards = evaluation_page.side_by_side(rows)
    main = comparison.main_measure(lines, "parameters")
    (found,) = evaluation_page.failures(cards, main, ["base", "fewshot", "tuned"])
    assert (found["kind"], found["counts"]) == ("invalid JSON", {"base": 20, "fewshot": 14, "tuned": 4})
    assert found["cards"][0]["id"] == "parameters19"
    assert len(found["cards"]) == evaluation_page.WORST


def test_confusions_are_placed_counted_and_listed() -> None:
    found = evaluation_page.confusion(classification.confusion(list("aaabc"), list("aabbb")))
    assert found["labels"] == ["a", "b", "c"]
    cells = {(cell["x"], cell["y"]): (cell["kind"], cell["title"]) for cell in found["cells"]}
    assert cells[10, 0] == ("wrong", "a \N{RIGHTWARDS ARROW} b: 1 of 3")
    assert cells[0, 0][0] == "right"
    assert [(pair["label"], pair["predicted"], pair["n"]) for pair in found["pairs"]] == [("a", "b", 1), ("c", "b", 1)]
    figures = {each["label"]: (each["recall"], each["precision"], each["f1"]) for each in found["by_label"]}
    assert figures == {"a": (2 / 3, 1.0, 0.8), "b": (1.0, 1 / 3, 0.5), "c": (0.0, None, 0.0)}
    assert found["by_label"][0]["label"] == "c"


def test_a_map_of_very_many_labels_holds_those_with_errors() -> None:
    labels = [f"label{number:03}" for number in range(120)]
    found = evaluation_page.confusion(classification.confusion([*labels, labels[119]], [*labels, labels[118]]))
    assert len(found["labels"]) == evaluation_page.LABELS
    assert found["left_out"] == 20
    assert {"label118", "label119"} <= set(found["labels"])


def test_a_classification_shows_its_confusions_and_what_was_not_generated_is_no_fault() -> None:
    rows = [
        prediction(arm, number, "a", label="a", predicted="b" if number < wrong else "a", stops=None, new_tokens=None)
        for arm, wrong in (("base", 9), ("fewshot", 9), ("tuned", 2))
        for number in range(20)
    ]
    for row in rows:
        row["exact_match"] = row["rouge_l"] = float(row["label"] == row["predicted"])
    html = page(rows)
    assert "2 of 20 rows got a wrong label" in html
    assert "<title>a \N{RIGHTWARDS ARROW} b: 2 of 20</title>" in html
    assert "the likeliest label is the answer" in html


def test_without_a_sure_difference_the_page_does_not_claim_one() -> None:
    html = page([row | {"nll": 4.0} for row in answered(base=9, fewshot=9, tuned=9)])
    assert 'class="chip cannot-tell"' in html
    assert not re.search('class="chip (better|worse)"', html)


def test_the_page_needs_nothing_from_elsewhere_and_text_of_a_row_is_never_markup() -> None:
    html = page(answered(base=0, fewshot=6, tuned=16))
    assert not re.search(r"https?://|<link|@import|url\(|<img|<iframe|fetch\(|src=", html)
    assert html.count("<script") == 1  # its own
    assert "&lt;/pre&gt;&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert "look_up" in html  # a turn that only calls a tool


def test_equal_inputs_give_an_equal_page_and_order_of_rows_does_not_matter() -> None:
    rows = answered(base=0, fewshot=6, tuned=16)
    assert page(rows) == page(rows[::-1])


def test_counts_slices_and_p_values_stand_on_the_page() -> None:
    html = page(answered(base=0, fewshot=6, tuned=20))
    for text in ("20 held-out rows", "683 exact", "111 near", "440 rows", "a loss of 1.250 nats"):
        assert text in html
    assert "Field F1 by length" in html
    assert "p &lt; 0.001, corrected" in html
    assert "Learning rate, at most 0.1, at the end 0" in html


def test_what_raters_chose_stands_on_the_page() -> None:
    score = ratings.Score("anna", "person", None, 8, 1, 1, 0.85, 0.6, 0.98, 0.039, None)
    rated = ratings.Rated([score], [ratings.Agreement(("anna", "judge-m"), 7, 0.9, 0.71)], ignored=3)
    html = page(answered(base=0, fewshot=6, tuned=20), rated=rated)
    for text in ("85%</span> <span", "[60%, 98%]", "8, 1, 1", "anna and judge-m", "0.71", "3 choices are of answers"):
        assert text in html
    assert "Nobody has rated" in page(answered(base=0, fewshot=6, tuned=20))


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


def test_validation_points_stand_where_the_validation_loss_was_measured() -> None:
    curve = evaluation_page.training_curve(
        [{"step": str(step), "loss": "1.0", "val_loss": "2.0" if step < 3 else "1.0"} for step in range(5)]
    )
    assert len(curve["series"]["validation"]["dots"]) == 2
    assert curve["series"]["validation"]["dots"][1][0] == 44 + 580 * 3 / 4
    assert curve["last_step"] == 4
