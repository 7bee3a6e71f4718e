"""The blind rating page: what it shows, and what it does not give away."""

import json
import re

from stages.lib import rating_page, ratings
from tests.unit.test_evaluation_page import SETTINGS, prediction

ROWS = [
    prediction(arm, number, f"</script> {word} {number}")
    for arm, word in (("base", "grey"), ("fewshot", "amber"), ("tuned", "blue"))
    for number in range(30)
]
QUESTIONS = {row["id"]: [{"role": "user", "content": "Which?"}] for row in ROWS}


def page() -> str:
    return rating_page.render(ROWS, QUESTIONS, SETTINGS)


def data() -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_neither_text_nor_source_names_an_arm_and_no_order_gives_it_away() -> None:
    assert not re.search("tuned|few.?shot|baseline|\\bbase\\b", page(), re.IGNORECASE)
    is_left = ["blue" in pair["left"] for pair in data()["pairs"]]
    assert 8 < sum(is_left) < 22
    assert data()["pairs"] != sorted(data()["pairs"], key=lambda pair: pair["id"])
    assert {tuple(pair) for pair in data()["pairs"]} == {tuple(sorted(pair)) for pair in data()["pairs"]}


def test_the_keys_on_the_page_are_those_that_ratings_knows() -> None:
    shown = ratings.pairs(ROWS, seed=SETTINGS.seed)
    assert [pair["key"] for pair in data()["pairs"]] == [pair.key for pair in shown]
    assert [pair["left"] for pair in data()["pairs"]] == [pair.left[1] for pair in shown]


def test_the_page_needs_nothing_from_elsewhere_and_equal_inputs_give_equal_bytes() -> None:
    assert not re.search(r"https?://|<link|@import|url\(|<img|<iframe|fetch\(|src=", page())
    assert page().count("</script>") == 2  # answers cannot end the script they stand in
    assert page() == rating_page.render(ROWS[::-1], QUESTIONS, SETTINGS)


def test_where_all_answers_are_alike_there_is_nothing_to_rate() -> None:
    rows = [row | {"answer": "same"} for row in ROWS]
    assert "There is no pair to rate" in rating_page.render(rows, QUESTIONS, SETTINGS)
