"""Cleaning: each switch changes or rejects what it says, counts it, and shows nothing of what it found."""

import dataclasses
import time
from collections import Counter
from typing import Any

import pytest

from stages.lib import cleaning
from stages.lib.errors import ConfigError
from stages.lib.rows import Unfit
from stages.lib.schema.data import Clean, Policy, Unicode

OFF = Clean(
    unicode=Unicode.keep,
    whitespace=False,
    refusals=Policy.ignore,
    pii={},
    min_answer_chars=0,
    max_answer_chars=None,
    max_answer_ratio=None,
    languages=[],
)
EMAIL = "ada@mail.example"


def settings(**changes: Any) -> Clean:
    return dataclasses.replace(OFF, **changes)


def pii(policy: Policy, *kinds: str) -> Clean:
    return settings(pii=dict.fromkeys(kinds or ("email", "phone", "card", "iban", "key"), policy))


def chat(question: str = "What?", answer: str = "That.", **content: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    empty = dict.fromkeys(("tools", "text", "chosen", "rejected", "label"))
    return {"kind": "chat", "messages": turns, **empty, **content}


def full(text: str) -> dict[str, Any]:
    """A row with the text in every place that holds one."""
    call = {"type": "function", "function": {"name": "send", "arguments": {"to": [text]}}}
    written = {"type": "function", "function": {"name": "send", "arguments": f'{{"to": "{text}"}}'}}
    answer = {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call, written]}
    return {
        "kind": "preference",
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": {"name": "send", "description": text}}],
        "text": None,
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": text}],
        "label": None,
    }


def refused(draft: dict[str, Any], how: Clean) -> tuple[str, str]:
    with pytest.raises(Unfit, match=r".") as caught:
        cleaning.clean(draft, how, Counter())
    return caught.value.code, caught.value.reason


def test_settings_that_change_nothing_give_the_same_object_and_count_nothing() -> None:
    draft, counts = chat("ﬁ  \n\n\n\ncall +49 30 901820", "I'm sorry, but I cannot help with that."), Counter[str]()
    assert cleaning.clean(draft, OFF, counts) is draft
    assert not counts


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (Unicode.nfc, "u\u0308 \ufb01", "ü \ufb01"),
        (Unicode.nfkc, "u\u0308 \ufb01", "ü fi"),
        (Unicode.keep, "u\u0308", "u\u0308"),
    ],
)
def test_unicode_is_normalized_only_when_asked_and_counted_by_row(form: Unicode, text: str, expected: str) -> None:
    counts = Counter[str]()
    cleaned = cleaning.clean(chat(text, text), settings(unicode=form), counts)
    assert [turn["content"] for turn in cleaned["messages"]] == [expected, expected]
    assert counts == ({} if form is Unicode.keep else {"cleaned/unicode": 1})


def test_a_row_that_is_normal_already_is_not_counted() -> None:
    draft, counts = chat(), Counter[str]()
    assert cleaning.clean(draft, settings(unicode=Unicode.nfkc, whitespace=True), counts) is draft
    assert not counts


def test_normalization_keeps_arguments_written_as_json_valid() -> None:
    call = {"type": "function", "function": {"name": "say", "arguments": '{"it": "\uff02"}'}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    cleaned = cleaning.clean(chat(messages=turns), settings(unicode=Unicode.nfkc), Counter())
    assert cleaned["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"it": "\\""}'


def test_needless_blanks_go_and_are_counted() -> None:
    counts = Counter[str]()
    cleaned = cleaning.clean(chat(" a  b \t\r\n\n\n\n  c\n"), settings(whitespace=True), counts)
    assert cleaned["messages"][0]["content"] == "a  b\n\n  c"
    assert counts == {"cleaned/whitespace": 1}


def test_the_draft_that_came_in_is_not_changed() -> None:
    draft = full(f" {EMAIL} ")
    cleaning.clean(draft, dataclasses.replace(pii(Policy.redact), whitespace=True, unicode=Unicode.nfkc), Counter())
    assert draft == full(f" {EMAIL} ")


def test_redaction_reaches_every_text_of_a_row() -> None:
    counts = Counter[str]()
    assert cleaning.clean(full(EMAIL), pii(Policy.redact), counts) == full("<email>")
    assert counts == {"pii/email": 7}


def test_a_plain_text_is_redacted_too() -> None:
    draft = chat(kind="text", messages=None, text=f"write to {EMAIL}")
    assert cleaning.clean(draft, pii(Policy.redact), Counter())["text"] == "write to <email>"


def test_each_kind_has_its_own_policy() -> None:
    counts = Counter[str]()
    how = settings(pii={"email": Policy.redact, "phone": Policy.count, "card": Policy.ignore})
    cleaned = cleaning.clean(chat(f"{EMAIL}, +49 30 901820, 4111 1111 1111 1111"), how, counts)
    assert cleaned["messages"][0]["content"] == "<email>, +49 30 901820, 4111 1111 1111 1111"
    assert counts == {"pii/email": 1, "pii/phone": 1}


def test_a_card_number_in_a_tool_call_is_found_as_a_number_too() -> None:
    call = {"type": "function", "function": {"name": "pay", "arguments": {"card": 4111111111111111, "sum": 12}}}
    turns = [{"role": "user", "content": "pay"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    cleaned = cleaning.clean(chat(messages=turns), pii(Policy.redact), Counter())
    assert cleaned["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"card": "<card>", "sum": 12}


@pytest.mark.parametrize("policy", [Policy.count, Policy.redact, Policy.reject])
def test_no_value_found_stands_in_a_reason_a_count_or_a_log(
    policy: Policy, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counter[str]()
    shown = ""
    with caplog.at_level(0):
        try:
            cleaning.clean(chat(f"{EMAIL} 4111 1111 1111 1111"), pii(policy), counts)
        except Unfit as unfit:
            shown = f"{unfit} {unfit.code} {unfit.reason}"
    assert ("holds card (1), email (1), which data.clean.pii rejects" in shown) == (policy is Policy.reject)
    said = shown + repr(counts) + caplog.text + "".join(capfd.readouterr())
    assert "ada" not in said
    assert "4111" not in said
    assert counts == {"pii/email": 1, "pii/card": 1}


def test_a_rejected_row_is_kept_without_what_is_redacted_or_rejected() -> None:
    row = {
        "to": [f"a\n{EMAIL}", "a\n+49 30 901820"],
        "card": 4111111111111111,
        "at": b"x",
        "raw": f'{{"to": "{EMAIL}"}}',
    }
    policies = {"email": Policy.redact, "card": Policy.reject, "phone": Policy.count}
    kept = {"to": ["a\n<email>", "a\n+49 30 901820"], "card": "<card>", "at": b"x", "raw": '{"to": "<email>"}'}
    assert cleaning.masked(row, policies) == kept
    assert cleaning.masked(row, {"email": Policy.count}) is row


def test_what_is_nested_without_end_is_neither_followed_nor_shown() -> None:
    deep: Any = EMAIL
    for _ in range(2000):
        deep = [deep]
    assert EMAIL not in cleaning.masked(deep, {"email": Policy.redact})
    call = {"type": "function", "function": {"name": "send", "arguments": "[" * 9000 + EMAIL + "]" * 9000}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    cleaned = cleaning.clean(chat(messages=turns), pii(Policy.redact), Counter())
    assert cleaned["messages"][1]["tool_calls"][0]["function"]["arguments"] == "[" * 9000 + "<email>" + "]" * 9000


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I\u2019m sorry, but I cannot fulfill this request. Is there anything else I can help you with?",
        "As an AI language model, I don't have personal opinions.",
        "As an AI, I don't have a house, so I cannot describe it. Can I help you with something else?",
        "Sorry, I am unable to provide that information.\n\nPlease let me know if you have any other questions!",
    ],
)
def test_an_answer_of_nothing_but_a_refusal_is_counted_or_rejected(answer: str) -> None:
    counts = Counter[str]()
    cleaning.clean(chat(answer=answer), settings(refusals=Policy.count), counts)
    assert counts == {"cleaned/refusals": 1}
    assert refused(chat(answer=answer), settings(refusals=Policy.reject))[0] == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot recommend this book enough.",
        "I'm sorry, but I'm unable to come into work today.",
        "I'm sorry, I can't provide the text. However, it is about whales.",
        "As an AI language model, I don't have a home. Bees live in hives of wax.",
        "Unfortunately, the train was late.",
        "As an AI assistant, I can help you with the logo.",
        "Sorry!",
    ],
)
def test_an_answer_that_says_something_is_no_refusal(answer: str) -> None:
    assert not cleaning.is_refusal(answer)


@pytest.mark.parametrize(
    "piece", ["I'm sorry ", "sorry, as an AI ", "As an AI I'm an ai ", "I cannot. ", "sorry but and "]
)
def test_apologies_without_end_take_no_longer_than_a_moment(piece: str) -> None:
    started = time.process_time()
    cleaning.is_refusal((piece * 100)[: cleaning.MAX_REFUSAL_CHARS])
    assert time.process_time() - started < 0.2


def test_a_refusal_that_is_the_unwanted_answer_is_kept() -> None:
    no = [{"role": "assistant", "content": "I'm sorry, but I can't assist with that."}]
    yes = [{"role": "assistant", "content": "Paris."}]
    pair = chat(kind="preference", messages=[{"role": "user", "content": "?"}], chosen=yes, rejected=no)
    cleaning.clean(pair, settings(refusals=Policy.reject), Counter())
    assert refused({**pair, "chosen": no, "rejected": yes}, settings(refusals=Policy.reject))[0] == "refusal"
    bad = chat(answer=no[0]["content"], kind="unpaired", label="false")
    cleaning.clean(bad, settings(refusals=Policy.reject), Counter())


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (settings(min_answer_chars=6), "short_answer"),
        (settings(max_answer_chars=4), "long_answer"),
        (settings(max_answer_ratio=0.9), "answer_ratio"),
    ],
)
def test_answers_keep_the_limits_to_the_character(how: Clean, code: str) -> None:
    draft = chat("What?", "That.")  # five characters each
    assert refused(draft, how)[0] == code
    limits = settings(min_answer_chars=5, max_answer_chars=5, max_answer_ratio=1.0)
    assert cleaning.clean(draft, limits, Counter()) is draft


def test_every_answer_of_a_conversation_is_held_to_the_limits() -> None:
    turns = [*chat("What?", "No.")["messages"], *chat("What?", "That.")["messages"]]
    assert refused(chat(messages=turns), settings(min_answer_chars=4))[0] == "short_answer"


def test_a_class_and_a_tool_call_are_not_answers_to_measure() -> None:
    how = settings(min_answer_chars=100, languages=["de"])
    cleaning.clean(chat(label="That."), how, Counter())
    calling = chat(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": {}}]}])
    cleaning.clean(calling, how, Counter())


def test_a_row_in_another_language_is_rejected_and_an_unclear_one_kept_and_counted() -> None:
    english = chat("Why?", "The harvest was late this year because of the rain.")
    cleaning.clean(english, settings(languages=["de", "en"]), Counter())
    code, reason = refused(english, settings(languages=["de"]))
    assert (code, reason) == ("wrong_language", "is in 'en', data.clean.languages are de")
    counts = Counter[str]()
    cleaning.clean(chat("1 + 1?", "2"), settings(languages=["de"]), counts)
    assert counts == {"cleaned/language_unclear": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pii": {"name": Policy.count}}, r"data\.clean\.pii: found \['name'\], expected kinds among email, phone"),
        ({"refusals": Policy.redact}, r"data\.clean\.refusals: found 'redact', expected ignore, count or reject"),
        ({"languages": ["english"]}, r"data\.clean\.languages: found \['english'\], expected ISO 639-1"),
        (
            {"min_answer_chars": 9, "max_answer_chars": 8},
            r"data\.clean\.max_answer_chars: found 8, expected null, or at least",
        ),
        ({"max_answer_ratio": 0.0}, r"data\.clean\.max_answer_ratio: found 0\.0, expected null, or above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**change)
