"""Examples in front of a question."""

import pytest

from stages.lib import fewshot, records
from stages.lib.errors import DataError


def row(number: int, task: str = "add", system: bool = False) -> dict:
    turns = [{"role": "user", "content": f"{number}+1"}, {"role": "assistant", "content": str(number + 1)}]
    if system:
        turns.insert(0, {"role": "system", "content": "Count."})
    return records.make(turns, group=str(number), source="test", task=task)


def test_the_choice_depends_on_seed_and_task_but_not_on_the_order_of_rows() -> None:
    train = [row(n) for n in range(20)] + [row(n, "other") for n in range(20)]
    chosen = fewshot.choose(train, "add", n=3, seed=1)
    assert chosen == fewshot.choose(train[::-1], "add", n=3, seed=1)
    assert {found["task"] for found in chosen} == {"add"}
    assert chosen != fewshot.choose(train, "add", n=3, seed=2)


def test_too_few_rows_of_a_task_are_an_error_that_names_the_keys() -> None:
    with pytest.raises(DataError, match=r"2 rows of task 'add', expected at least 3.*evaluate\.fewshot"):
        fewshot.choose([row(1), row(2)], "add", n=3, seed=1)


def test_the_system_turn_of_the_question_stands_once_and_first() -> None:
    question = row(5, system=True)["messages"][:-1]
    turns = fewshot.conversation([row(1, system=True), row(2)], question)
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Count."),
        ("user", "1+1"),
        ("assistant", "2"),
        ("user", "2+1"),
        ("assistant", "3"),
        ("user", "5+1"),
    ]
