"""Ratings: what a pair is, files read back strictly, win rates and agreement."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib import ratings
from stages.lib.errors import DataError
from tests.unit.test_evaluation_page import SETTINGS, prediction

ROWS = [prediction(arm, number, f"{arm} says {number}") for arm in ("base", "fewshot", "tuned") for number in range(30)]


def shown(rows: list[dict[str, Any]] = ROWS, seed: int = 42) -> list[ratings.Pair]:
    return ratings.pairs(rows, seed=seed)


def side_of(pair: ratings.Pair, arm: str) -> str:
    return "left" if pair.left[0] == arm else "right"


def choices(rater: str, outcomes: str, pairs: list[ratings.Pair] | None = None) -> list[ratings.Choice]:
    """One choice per letter: w(on by the tuned model), l(ost), t(ie)."""
    return [
        ratings.Choice(
            rater,
            "model" if rater.startswith("judge") else "person",
            pair.key,
            {"w": side_of(pair, "tuned"), "l": side_of(pair, "fewshot"), "t": "tie"}[letter],
            None,
            Path("a.json"),
        )
        for letter, pair in zip(outcomes, pairs or shown(), strict=False)
    ]


def test_pairs_are_of_tuned_and_the_base_with_examples_on_shuffled_sides() -> None:
    assert {frozenset((pair.left[0], pair.right[0])) for pair in shown()} == {frozenset(("tuned", "fewshot"))}
    assert 8 < sum(pair.left[0] == "tuned" for pair in shown()) < 22
    assert shown() == shown(ROWS[::-1])
    assert [pair.left[0] for pair in shown()] != [pair.left[0] for pair in shown(seed=1)]


def test_rows_answered_alike_are_no_pair() -> None:
    rows = [prediction(arm, 0, answer) for arm, answer in (("tuned", "same"), ("fewshot", " same\n"))]
    assert shown(rows) == []


def test_a_tie_counts_half_and_the_interval_holds_the_win_rate() -> None:
    (score,) = ratings.summarise(choices("anna", "w" * 12 + "tt" + "l" * 4), shown(), SETTINGS).scores
    assert (score.wins, score.ties, score.losses, score.n) == (12, 2, 4, 18)
    assert score.win_rate == 13 / 18
    assert 0.4 < score.low < 13 / 18 < score.high < 1
    assert score.p_value == pytest.approx(0.0768, abs=1e-4)  # 12 of 16, two-sided
    found = ratings.metrics(ratings.Rated([score]))
    assert (found["ratings/anna/win_rate"], found["ratings/anna/n"]) == (13 / 18, 18)


def test_a_choice_survives_other_rows_and_another_seed_but_not_another_answer() -> None:
    made = choices("anna", "w" * 30)
    changed = [
        row | {"answer": "new"} if row["id"] == "parameters03" and row["arm"] == "tuned" else row for row in ROWS
    ]
    found = ratings.summarise(made, shown(changed, seed=7), SETTINGS)
    assert (found.scores[0].wins, found.scores[0].losses, found.ignored) == (29, 0, 1)
    assert ratings.metrics(found)["ratings/ignored"] == 1


def test_people_count_together_and_models_apart() -> None:
    made = choices("anna", "www") + choices("ben", "wlw") + choices("judge-m", "lll")
    found = ratings.summarise(made, shown(), SETTINGS)
    assert [score.rater for score in found.scores] == ["people", "anna", "ben", "judge-m"]
    assert (found.scores[0].wins, found.scores[0].ties, found.scores[0].n) == (2, 1, 3)


def test_few_choices_that_are_all_alike_are_no_verdict() -> None:
    for outcomes, said in (("www", "cannot tell"), ("w" * 8, "better"), ("l" * 8, "worse"), ("wl" * 4, "cannot tell")):
        assert ratings.summarise(choices("anna", outcomes), shown(), SETTINGS).scores[0].verdict == said


def test_a_model_is_held_against_each_person_and_all_of_them() -> None:
    made = choices("anna", "wwl") + choices("ben", "wlt") + choices("judge-m", "wtl")
    found = {each.raters: each.share for each in ratings.summarise(made, shown(), SETTINGS).agreements}
    assert found == {
        ("people", "judge-m"): 1.0,  # together: won, tied, lost
        ("anna", "ben"): pytest.approx(1 / 3),
        ("anna", "judge-m"): pytest.approx(2 / 3),
        ("ben", "judge-m"): pytest.approx(1 / 3),
    }


def test_agreement_is_cohens_kappa_over_what_both_judged() -> None:
    from sklearn.metrics import cohen_kappa_score

    anna, ben = "wwltwlltww", "wltlwlwtw"
    (found,) = ratings.summarise(choices("anna", anna) + choices("ben", ben), shown(), SETTINGS).agreements
    assert (found.raters, found.n) == (("anna", "ben"), 9)
    assert found.kappa == pytest.approx(cohen_kappa_score(list(anna[:9]), list(ben)))
    (alike,) = ratings.summarise(choices("anna", "ww") + choices("ben", "ww"), shown(), SETTINGS).agreements
    assert (alike.share, alike.kappa) == (1.0, None)


def test_tasks_are_told_apart_where_there_are_several() -> None:
    rows = ROWS + [
        prediction(arm, number, f"{arm}{number}", "b") for arm in ("fewshot", "tuned") for number in range(9)
    ]
    found = ratings.summarise(choices("anna", "w" * 39, shown(rows)), shown(rows), SETTINGS)
    assert [(score.task, score.n) for score in found.scores] == [(None, 39), ("b", 9), ("parameters", 30)]


def test_a_model_that_prefers_a_place_is_seen() -> None:
    orders = [("left", "right"), ("left", "left"), ("right", "left"), ("tie", "tie")]
    made = [
        ratings.Choice("judge-m", "model", pair.key, "tie", order, Path("a"))
        for pair, order in zip(shown(), orders, strict=False)
    ]
    assert ratings.summarise(made, shown(), SETTINGS).scores[0].same_place == 0.5


def saved(**changes: Any) -> dict[str, Any]:
    pair = shown()[0]
    entry = {"id": pair.id, "task": pair.task, "key": pair.key, "choice": "left"}
    return {"rater": "anna", "kind": "person", "page": "0" * 64, "pairs": [entry]} | changes


def write(folder: Path, content: Any, name: str = "a.json") -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_files_are_read_back_and_a_rater_may_have_several(tmp_path: Path) -> None:
    write(tmp_path, saved())
    write(tmp_path, saved(), "b.json")
    (tmp_path / "README.md").write_text("no rating")
    (choice,) = ratings.read(tmp_path)
    assert (choice.rater, choice.choice, choice.key) == ("anna", "left", shown()[0].key)
    assert ratings.read(tmp_path / "absent") == []


ENTRY = saved()["pairs"][0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"a\.json: no JSON .* expected what rate\.html saves"),
        ([], r"a\.json: the file: found a list, expected an object of rater, kind, page, pairs"),
        ({"rater": "anna"}, r"a\.json: the file: found rater, expected"),
        (saved(pairs={}), r"a\.json: the file: pairs: found a dict, expected a list"),
        (saved(rater="a/b"), r"a\.json: rater: found 'a/b', expected 1 to 60"),
        (saved(rater="people"), r"a\.json: rater: found 'people'"),
        (saved(kind="crowd"), r"a\.json: kind: found 'crowd', expected one of person, model"),
        (saved(pairs=[ENTRY | {"choice": "up"}]), r"a\.json: pairs\[0\]\.choice: found 'up', expected one of left"),
        (saved(pairs=[ENTRY | {"key": "x"}]), r"a\.json: pairs\[0\]\.key: found 'x', expected 64 hex digits"),
        (saved(pairs=[ENTRY | {"orders": ["left"]}]), r"pairs\[0\]\.orders: found 1 choices, expected .* 2"),
        (
            saved(pairs=[ENTRY, ENTRY | {"choice": "tie"}]),
            r"pairs\[1\] of rater 'anna': found 'tie', but .*says 'left'",
        ),
    ],
)
def test_a_file_that_is_no_rating_says_where_and_what_was_expected(tmp_path: Path, content: Any, said: str) -> None:
    write(tmp_path, content)
    with pytest.raises(DataError, match=said):
        ratings.read(tmp_path)
