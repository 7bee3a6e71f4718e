"""The rules of a row's content: each with a row that keeps it and one that breaks it."""

import json
from typing import Any

import pytest

from stages.lib import rows
from stages.lib.rows import Unfit, Unparsed

USER = {"role": "user", "content": "How much is 2 and 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
NOTHING = dict.fromkeys(("messages", "tools", "text", "chosen", "rejected", "label"))


def calling(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def with_id(id: str) -> dict[str, Any]:
    return {**CALL, "id": id}


def checked(kind: str = "chat", max_chars: int = 100, **content: Any) -> dict[str, Any]:
    return rows.checked({"kind": kind, **NOTHING, **content}, max_chars)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [SYSTEM, USER, ANSWER],
        [USER, ANSWER, USER, ANSWER],
        [USER, {**ANSWER, "reasoning_content": "2+2=4"}],
        [USER, CALLING],
        [USER, CALLING, RESULT, ANSWER],
        [USER, CALLING, RESULT, CALLING, RESULT, ANSWER, USER, ANSWER],
        [USER, {**CALLING, "content": "I add."}, {**RESULT, "name": "add"}, ANSWER],
        [USER, calling(CALL, CALL), RESULT, RESULT, ANSWER],
        [USER, calling(CALL, CALL), RESULT, ANSWER],
        [
            USER,
            {"role": "assistant", "tool_calls": [with_id("a"), with_id("b")]},
            {**RESULT, "tool_call_id": "b"},
            {**RESULT, "tool_call_id": "a"},
            ANSWER,
        ],
        [USER, CALLING, {"role": "tool", "content": ""}, ANSWER],
        [{"role": "user", "content": "\N{GRINNING FACE}"}, ANSWER],
    ],
)
def test_a_conversation_that_keeps_the_rules_is_kept_as_it_is(messages: list[dict[str, Any]]) -> None:
    plain = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    assert checked(messages=messages, max_chars=500)["messages"] == plain


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({**USER, "name": "Ann", "weight": 1}, USER),
        ({**USER, "tool_calls": None, "tool_call_id": None}, USER),
        ({**USER, "role": "human"}, USER),
        ({"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
         {"role": "user", "content": "2+2?"}),
    ],
)  # fmt: skip
def test_a_turn_is_brought_to_the_form_of_records(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    assert checked(messages=[turn, ANSWER])["messages"] == [expected, ANSWER]


@pytest.mark.parametrize(
    "call",
    [
        {"name": "add", "arguments": {"a": 2, "b": 2}},
        {"name": "add", "arguments": '{"b": 2, "a": 2}'},
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}, "id": None},
        {**CALL, "index": 0},
    ],
)
def test_tool_calls_have_one_form(call: dict[str, Any]) -> None:
    for calls in ([call], json.dumps(call), json.dumps([call])):
        assert checked(messages=[USER, {**CALLING, "tool_calls": calls}], max_chars=500)["messages"] == [USER, CALLING]


@pytest.mark.parametrize("tools", [{"name": "add"}, [{"name": "add"}], '[{"function": {"name": "add"}}]'])
def test_tools_have_one_form_and_none_is_none(tools: Any) -> None:
    expected = [{"type": "function", "function": {"name": "add"}}]
    assert checked(messages=[USER, ANSWER], tools=tools, max_chars=500)["tools"] == expected
    assert [checked(messages=[USER, ANSWER], tools=none)["tools"] for none in (None, "", "[]", [])] == [None] * 4


DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        (None, "no_messages", "null"),
        ("hello", "no_messages", "hello"),
        ([], "no_messages", "list of turns"),
        (["hello"], "no_turn", "turn 1"),
        ([{"role": "user"}, ANSWER], "no_turn", "role and content"),
        ([{"content": "2"}, ANSWER], "no_turn", "role and content"),
        ([USER], "no_assistant", "nothing to learn"),
        ([SYSTEM, USER], "no_assistant", "nothing to learn"),
        ([USER, {"role": "bot", "content": "4"}], "role", "system, user, assistant, tool"),
        ([USER, {"role": ["assistant"], "content": "4"}], "role", "assistant"),
        ([USER, {"role": "assistant", "content": None}], "no_text", "turn 2 is null"),
        ([USER, {"role": "assistant", "content": 4}], "no_text", "turn 2 is 4"),
        ([USER, {**ANSWER, "reasoning_content": 4}], "no_text", "reasoning_content of turn 2"),
        ([USER, {"role": "assistant", "content": {"text": "4"}}], "no_text", "turn 2"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "content_part", "image_url.*only parts"),
        ([{"role": "user", "content": ["2+2?"]}, ANSWER], "content_part", "turn 1"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty_answer", "turn 2"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": []}], "empty_answer", "turn 2"),
        ([{"role": "user", "content": ""}, ANSWER], "empty_turn", "turn 1"),
        ([{"role": "user", "content": []}, ANSWER], "empty_turn", "turn 1"),
        ([ANSWER, USER], "role_order", "turn 1 is of assistant, expected user"),
        ([USER, USER, ANSWER], "role_order", "turn 2 is of user, expected assistant"),
        ([USER, SYSTEM, ANSWER], "role_order", "turn 2 is of system"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "role_order", "turn 2 is of system"),
        ([SYSTEM, ANSWER], "role_order", "turn 2 is of assistant"),
        ([USER, ANSWER, ANSWER], "role_order", "turn 3 is of assistant, expected user"),
        ([USER, CALLING, ANSWER], "role_order", "expected tool: a call waits"),
        ([USER, CALLING, RESULT, USER, ANSWER], "role_order", "turn 4 is of user"),
        ([USER, ANSWER, USER], "no_last_answer", "last turn is of user"),
        ([USER, CALLING, RESULT], "no_last_answer", "last turn is of tool"),
        ([USER, RESULT, ANSWER], "tool_answer", "turn 2 is of a tool, but no call waits"),
        ([USER, ANSWER, RESULT, ANSWER], "tool_answer", "turn 3"),
        ([USER, CALLING, RESULT, RESULT, ANSWER], "tool_answer", "turn 4"),
        ([USER, calling(with_id("a")), {**RESULT, "tool_call_id": "b"}, ANSWER], "tool_answer", "'?.b.*waiting are"),
        ([USER, calling(with_id("a"), with_id("b")), *[{**RESULT, "tool_call_id": "b"}] * 2], "tool_answer", "turn 4"),
        ([USER, CALLING, {**RESULT, "tool_call_id": 7}, ANSWER], "tool_answer", "tool_call_id of turn 3 is 7"),
        ([{**USER, "tool_calls": [CALL]}, ANSWER], "tool_call", "only an assistant"),
        ([USER, calling({"arguments": {}})], "tool_call", "a name and arguments"),
        ([USER, calling({"name": " "})], "tool_call", "the name in the tool call of turn 2"),
        ([USER, calling({"name": "add", "arguments": "{"})], "tool_call", "arguments of .* no JSON"),
        ([USER, calling({"name": "add", "arguments": [1]})], "tool_call", "expected an object"),
        ([USER, calling({"name": "add", "arguments": {"a": float("nan")}})], "tool_call", "no JSON"),
        ([USER, calling({"name": "add", "arguments": '{"a": NaN}'})], "tool_call", "no JSON"),
        ([USER, calling({"name": "add", "arguments": {"a": b"2"}})], "tool_call", "no JSON"),
        ([USER, calling({"name": "add", "arguments": {"a": DEEP}})], "tool_call", "nested deeper than 50"),
        ([USER, calling({"name": "add", "arguments": {"a": "\x00"}})], "nul", "turn 2"),
        ([USER, calling({"name": "\udc00"})], "surrogate", "turn 2"),
        ([USER, {**CALLING, "tool_calls": "[" * 9999}], "tool_call", "no JSON"),
        ([USER, {**CALLING, "tool_calls": 7}], "tool_call", "turn 2 is 7"),
        ([USER, {"role": "assistant", "content": "4\x00"}], "nul", "turn 2"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "surrogate", "turn 2"),
        ([USER, {**ANSWER, "reasoning_content": "\ud800"}], "surrogate", "turn 2"),
        ([USER, {"role": "assistant", "content": "4" * 100}], "too_long", "120 characters, data.max_chars is 100"),
        ([USER, {**ANSWER, "reasoning_content": "4" * 100}], "too_long", "121 characters"),
        ([USER, calling({"name": "add", "arguments": {"a": "4" * 100}})], "too_long", "data.max_chars"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(messages: object, code: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason) as unfit:
        checked(messages=messages)
    assert unfit.value.code == code


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [
        ({"kind": "text", "text": 4}, "no_text", "the text is 4"),
        ({"kind": "text", "text": " "}, "empty_text", "empty"),
        ({"kind": "text", "text": "a\x00"}, "nul", "the text"),
        ({"kind": "text", "text": "a" * 101}, "too_long", "101 characters"),
        ({"kind": "unpaired", "messages": [USER, ANSWER], "label": "maybe"}, "bad_label", "true or false"),
        ({"kind": "unpaired", "messages": [USER], "label": "true"}, "no_assistant", "nothing to learn"),
        ({"kind": "preference", "messages": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "same_answers", "same"),
        ({"kind": "preference", "messages": [], "chosen": [ANSWER], "rejected": [ANSWER]}, "no_messages", "messages"),
        ({"kind": "preference", "messages": [USER], "chosen": None, "rejected": [ANSWER]}, "no_messages", "chosen"),
        ({"kind": "preference", "messages": [USER], "chosen": [ANSWER], "rejected": [USER]}, "no_assistant", "reject"),
        ({"kind": "preference", "messages": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, CALLING]},
         "no_question", "ends with a turn of system"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools", "tools: no JSON"),
        ({"messages": [USER, ANSWER], "tools": 7}, "tools", "tools is 7"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools", "a function with a name"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "a", "parameters": {"x": float("inf")}}]}, "tools", "no JSON"),
    ],
)  # fmt: skip
def test_a_broken_rule_of_another_kind_is_named(content: dict[str, Any], code: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason) as unfit:
        checked(**content)
    assert unfit.value.code == code


def test_other_kinds_that_keep_the_rules_are_kept() -> None:
    assert checked("text", text="Once upon a time.")["text"] == "Once upon a time."
    assert checked("unpaired", messages=[USER, ANSWER], label="false")["label"] == "false"
    other = {"role": "assistant", "content": "5"}
    kept = checked("preference", messages=[USER], chosen=[ANSWER], rejected=[other])
    assert (kept["messages"], kept["chosen"], kept["rejected"]) == ([USER], [ANSWER], [other])


def test_what_was_checked_keeps_the_rules_unchanged() -> None:
    once = checked(messages=[SYSTEM, USER, CALLING, RESULT, ANSWER], tools=[{"name": "add"}], max_chars=500)
    assert rows.checked(once, 500) == once


def test_a_rejected_row_is_kept_as_text_that_can_be_written() -> None:
    kept = rows.rejection("my.jsonl:3", Unfit("surrogate", "half of \ud800"), {"prompt": "\ud800"})
    assert f"{kept.row}{kept.reason}".encode()
    assert (kept.where, kept.code) == ("my.jsonl:3", "surrogate")
    assert len(rows.rejection("", Unfit("long", ""), "a" * 9999).row) == rows.KEPT_CHARS


@pytest.mark.parametrize("row", [{"n": 10**5000}, {"a": DEEP}, {("a", "b"): 1}, {"b": b"\xff"}])
def test_a_row_that_no_json_can_hold_is_rejected_all_the_same(row: Any) -> None:
    assert rows.rejection("", Unfit("code", "reason"), row).row.encode()


def test_an_unparsed_row_survives_the_way_from_one_process_to_another() -> None:
    import pickle

    found = pickle.loads(pickle.dumps(Unparsed("bad_json", "no value", "{")))
    assert (found.code, found.reason, found.row) == ("bad_json", "no value", "{")
