"""Measures: literals checked by eye, and answers that must not win."""

import pytest

from stages.lib.measures import SCORES, applicable, json_text

REFERENCE = '{"x": "int", "axis": "int, optional"}'


@pytest.mark.parametrize(
    ("answer", "exact", "valid", "f1", "rouge", "chrf"),
    [
        (REFERENCE, 1, 1, 1, 1, 1),
        ('{"axis":"int,  optional","x":"int"}', 0, 1, 1, 0.6, 0.8573),  # another order and spacing, the same fields
        ('{"x": "int", "axis": "int"}', 0, 1, 0.5, 0.8889, 0.6946),
        ('{"x": "int"}', 0, 1, 2 / 3, 0.5714, 0.2965),
        ('{"x": "int", "x": "int", "x": "int", "axis": "int, optional"}', 0, 1, 2 / 3, 0.7143, 0.8839),
        ('{"x": 1, "axis": "int, optional"}', 0, 1, 0.5, 0.8, 0.7703),  # right name, wrong kind of value
        (f"```json\n{REFERENCE}\n```", 0, 0, 0, 0.9091, 0.9383),  # of no use to a program
        ("", 0, 0, 0, 0, 0),
        ("{}", 0, 1, 0, 0, 0.0373),  # valid and empty: field F1 sees through it
        ("[1]", 0, 0, 0, 0, 0),
        ("NaN", 0, 0, 0, 0, 0.0123),
    ],
)
def test_measures_give_figures_worked_out_by_hand_and_chrf_the_recorded_one(answer, exact, valid, f1, rouge, chrf):
    found = {name: round(score(answer, REFERENCE), 4) for name, score in SCORES.items()}
    expected = {"exact_match": exact, "json_valid": valid, "field_f1": f1, "rouge_l": rouge, "chrf": chrf}
    assert found == {name: round(value, 4) for name, value in expected.items()}


@pytest.mark.parametrize("lazy", ["", "{}", "Give the parameters.\n\nx : int\naxis : int, optional\n", '{"x": "int"}'])
def test_an_empty_a_constant_and_a_copied_answer_never_win(lazy: str) -> None:
    references = [REFERENCE, '{"y": "float"}', '{"n": "int", "seed": "int or None"}']
    for name in ("exact_match", "field_f1", "rouge_l", "chrf"):
        lazy_mean = sum(SCORES[name](lazy, reference) for reference in references) / 3
        assert lazy_mean < 0.5 < sum(SCORES[name](reference, reference) for reference in references) / 3


@pytest.mark.parametrize("name", SCORES)
def test_a_perfect_answer_scores_one_and_white_space_around_it_costs_nothing(name: str) -> None:
    assert SCORES[name](f"\n{REFERENCE} ", REFERENCE) == pytest.approx(1, abs=0.02)
    assert SCORES[name](REFERENCE, REFERENCE) == 1


def test_json_measures_apply_only_where_every_reference_is_a_json_object() -> None:
    assert applicable([REFERENCE, "{}"]) == ["exact_match", "json_valid", "field_f1", "rouge_l", "chrf"]
    assert applicable([REFERENCE, "Return the sum."]) == ["exact_match", "rouge_l", "chrf"]


def test_an_object_nested_too_deep_to_read_is_no_json_object_rather_than_a_crash() -> None:
    assert json_text.read_object('{"a":' * 100_000) is None


def test_the_evaluate_library_gives_the_scores_of_every_row() -> None:
    from stages.lib.measures import library

    found = library.score_rows(["exact_match", "field_f1"], [REFERENCE, '{"x": "int"}'], [REFERENCE, REFERENCE])
    assert found == {"exact_match": [1, 0], "field_f1": [1, pytest.approx(2 / 3)]}
