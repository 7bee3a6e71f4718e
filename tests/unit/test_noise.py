"""Noisy twins: the user's words get slips, everything else stays, and the same row gets the same ones everywhere."""

import os
import subprocess
import sys
from typing import Any

import pytest

from stages.lib import records
from stages.lib.errors import ConfigError
from stages.lib.noise import NEIGHBOURS, noisy
from stages.lib.schema.data import Noise

QUESTION = "How does the transpose of a matrix change its rows and columns?"


def settings(**changes: Any) -> Noise:
    return Noise(**{"fraction": 1.0, "rate": 0.5, "kinds": ["typo", "case", "spacing"], "seed": 42, **changes})


def row(question: str = QUESTION, answer: str = "It swaps them.", *, group: str = "", **extra: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    if "chosen" not in extra:
        turns.append({"role": "assistant", "content": answer})
    return records.make(turns, group=group, source="a.jsonl", task="chat", meta={"where": "a.jsonl:1"}, **extra)


def twin_of(original: dict[str, Any], **changes: Any) -> dict[str, Any]:
    twin = noisy(original, settings(**changes))
    assert twin is not None
    return twin


def test_only_the_users_words_change() -> None:
    original = row()
    twin = twin_of(original)
    assert twin["messages"][1]["content"] != QUESTION
    twin["messages"][1]["content"] = QUESTION
    assert twin["messages"] == original["messages"]


def test_a_twin_is_a_record_of_its_own_that_names_its_original() -> None:
    original = row()
    twin = twin_of(original)
    assert twin["id"] != original["id"]
    assert twin["meta"] == {"where": "a.jsonl:1", "noise_of": original["id"]}
    assert (twin["group"], twin["source"], twin["task"]) == (original["id"], "a.jsonl", "chat")
    assert twin_of(row(group="g"))["group"] == "g"
    assert records.rows(records.table([twin])) == [twin]


def test_answers_tools_and_labels_of_other_kinds_stay() -> None:
    pair = {"chosen": [{"role": "assistant", "content": "Yes"}], "rejected": [{"role": "assistant", "content": "No"}]}
    original = row(kind="preference", tools=[{"type": "function"}], label="x", **pair)
    twin = twin_of(original)
    same = ("kind", "chosen", "rejected", "tools", "label", "text", "split")
    assert {key: twin[key] for key in same} == {key: original[key] for key in same}


def test_slips_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from tests.unit.test_noise import row, settings; from stages.lib.noise import noisy;"
        "print(noisy(row(), settings())['messages'][1]['content'], end='')"
    )
    variables = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert done.stdout == twin_of(row())["messages"][1]["content"]


def test_another_seed_gives_other_slips() -> None:
    assert twin_of(row(), seed=1)["messages"] != twin_of(row(), seed=2)["messages"]


def test_the_fraction_says_how_many_and_a_smaller_one_is_contained_in_a_larger() -> None:
    originals = [row(f"{QUESTION} {number}") for number in range(400)]
    few = {one["id"] for one in originals if noisy(one, settings(fraction=0.2))}
    many = {one["id"] for one in originals if noisy(one, settings(fraction=0.5))}
    assert few < many
    assert 50 < len(few) < 110
    assert 160 < len(many) < 240
    assert noisy(originals[0], settings(fraction=0.0)) is None


def test_a_twin_never_equals_its_original_however_low_the_rate() -> None:
    for number in range(200):
        original = row(f"Why aaa {number}?")
        assert twin_of(original, rate=1e-9)["messages"][1]["content"] != original["messages"][1]["content"]


@pytest.mark.parametrize("question", ["1 + 1 = ?", "是什么?", "to be"])
def test_what_has_no_word_to_slip_on_has_no_twin(question: str) -> None:
    assert noisy(row(question), settings()) is None


def test_a_text_has_no_twin() -> None:
    text = records.make(None, kind="text", text="All of it.", group="", source="a", task="text")
    assert noisy(text, settings()) is None


@pytest.mark.parametrize("kind", ["case", "spacing", "typo"])
def test_each_kind_changes_only_what_it_says(kind: str) -> None:
    changed = twin_of(row(), kinds=[kind], rate=1.0)["messages"][1]["content"]
    assert changed != QUESTION
    if kind == "case":
        assert changed.lower() == QUESTION.lower()
    elif kind == "spacing":
        assert changed.replace(" ", "") == QUESTION.replace(" ", "")
    else:
        assert len(changed.split()) == len(QUESTION.split())
        assert changed.lower() != QUESTION.lower()


def test_keys_beside_each_other_are_those_of_a_keyboard() -> None:
    assert {letter: set(NEIGHBOURS[letter]) for letter in "qgp"} == {
        "q": set("wa"),
        "g": set("fhtyvb"),
        "p": set("ol"),
    }
    assert all(letter in NEIGHBOURS[near] for letter, found in NEIGHBOURS.items() for near in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.5}, r"data\.noise\.fraction: found 1\.5, expected between 0 and 1"),
        ({"rate": 0.0}, r"data\.noise\.rate: found 0\.0, expected above 0"),
        ({"kinds": ["upper"]}, r"data\.noise\.kinds: found \['upper'\], expected some of typo, case, spacing"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**change)
