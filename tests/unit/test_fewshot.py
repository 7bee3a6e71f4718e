"""Examples in front of a question."""

from pathlib import Path

import pytest

from stages.lib import fewshot, records
from stages.lib.errors import DataError


def row(number: int, task: str = "add", system: bool = False) -> dict:
    turns = [{"role": "user", "content": f"{number}+1"}, {"role": "assistant", "content": str(number + 1)}]
    if system:
        turns.insert(0, {"role": "system", "content": "Count."})
    return records.make(turns, group=str(number), source="test", task=task)


def written(path: Path, rows: list[dict]) -> Path:
    records.write(path, rows)
    return path


def test_the_choice_depends_on_seed_and_task_but_not_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [row(n) for n in range(20)] + [row(n, "other") for n in range(20)]
    train, turned = written(tmp_path / "a.parquet", rows), written(tmp_path / "b.parquet", rows[::-1])
    chosen = fewshot.choose(train, ["add", "other"], n=3, seed=1)
    assert chosen == fewshot.choose(turned, ["add", "other"], n=3, seed=1)
    assert {task: {found["task"] for found in rows} for task, rows in chosen.items()} == {
        "add": {"add"},
        "other": {"other"},
    }
    assert chosen != fewshot.choose(train, ["add", "other"], n=3, seed=2)


def test_too_few_rows_of_a_task_are_an_error_that_names_the_keys(tmp_path: Path) -> None:
    train = written(tmp_path / "train.parquet", [row(1), row(2)])
    with pytest.raises(DataError, match=r"2 rows of task 'add', expected at least 3.*evaluate\.fewshot"):
        fewshot.choose(train, ["add"], n=3, seed=1)


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
