"""The rules of a conversation: each with a row that keeps it and one that breaks it."""

import pytest

from stages.lib import rows
from stages.lib.rows import Unfit

USER = {"role": "user", "content": "How much is 2 and 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "messages",
    [[USER, ANSWER], [SYSTEM, USER, ANSWER], [USER, ANSWER, USER, ANSWER], [{**USER, "name": "Ann"}, ANSWER]],
)
def test_a_conversation_that_ends_with_an_answer_is_kept_without_other_keys(messages: list[dict[str, str]]) -> None:
    assert rows.conversation(messages, 100) == [{key: turn[key] for key in ("role", "content")} for turn in messages]


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        (None, "no_messages", "null"),
        ("hello", "no_messages", "hello"),
        ([], "no_messages", "list of turns"),
        (["hello"], "no_turn", "turn 1"),
        ([{"role": "user"}, ANSWER], "no_turn", "role and content"),
        ([USER], "no_assistant", "nothing to learn"),
        ([SYSTEM, USER], "no_assistant", "nothing to learn"),
        ([USER, {"role": "bot", "content": "4"}], "role", "system, user, assistant"),
        ([USER, {"role": "assistant", "content": None}], "no_text", "turn 2 is null"),
        ([USER, {"role": "assistant", "content": 4}], "no_text", "turn 2 is 4"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty_answer", "turn 2"),
        ([{"role": "user", "content": ""}, ANSWER], "empty_turn", "turn 1"),
        ([ANSWER, USER], "role_order", "turn 1 is of assistant, expected user"),
        ([USER, USER, ANSWER], "role_order", "turn 2 is of user, expected assistant"),
        ([USER, SYSTEM, ANSWER], "role_order", "turn 2 is of system"),
        ([SYSTEM, ANSWER], "role_order", "turn 2 is of assistant"),
        ([USER, ANSWER, USER], "no_last_answer", "last turn is of user"),
        ([USER, {"role": "assistant", "content": "4\x00"}], "nul", "turn 2"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "surrogate", "turn 2"),
        ([USER, {"role": "assistant", "content": "4" * 100}], "too_long", "data.max_chars is 100"),
    ],
)
def test_a_broken_rule_is_named(messages: object, code: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason) as unfit:
        rows.conversation(messages, 100)
    assert unfit.value.code == code


def test_a_rejected_row_is_kept_as_text_that_can_be_written() -> None:
    kept = rows.rejection("my.jsonl:3", Unfit("surrogate", "half a character"), {"prompt": "\ud800"})
    assert kept.row.encode("utf-8")
    assert (kept.where, kept.code) == ("my.jsonl:3", "surrogate")
