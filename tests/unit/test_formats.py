"""Every form in which people write rows gives the content that the record has."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib import formats, rows
from stages.lib.errors import ConfigError
from stages.lib.rows import Unfit
from stages.lib.schema.data import Data, Format
from tests.data_settings import settings

ASKED = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
CALLING = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TO_CLASSIFY = {"role": "user", "content": "Name the class of this text.\n\n2+2"}
TOOL = {"name": "add", "parameters": {"type": "object"}}

CHAT = {"kind": "chat", "messages": [ASKED, GOOD]}
PAIR = {"kind": "preference", "messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
WANTED = {"kind": "unpaired", "messages": [ASKED, GOOD], "label": "true"}


def said(who: str, what: str) -> dict[str, str]:
    return {"from": who, "value": what}


def draft(row: dict[str, Any], **changes: Any) -> formats.Draft:
    data: Data = settings(**changes)
    return formats.draft(row, data, formats.templates(data))


def content(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What the record of a row holds, without the empty fields."""
    found = rows.checked(draft(row, **changes).content, 1000)
    return {key: value for key, value in found.items() if value is not None}


# fmt: off
FORMS: list[tuple[Format, dict[str, Any], dict[str, Any]]] = [
    (Format.messages, {"messages": [SYSTEM, ASKED, GOOD]}, {"kind": "chat", "messages": [SYSTEM, ASKED, GOOD]}),
    (Format.messages, {"messages": [ASKED, GOOD], "prompt": "2+2?", "text": "2+2=4"}, CHAT),
    (Format.messages, {"messages": [said("human", "2+2?"), said("gpt", "4")]}, CHAT),
    (Format.messages, {"messages": [ASKED, CALLING], "tools": [TOOL]},
     {"kind": "chat", "messages": [ASKED, CALLING], "tools": [{"type": "function", "function": TOOL}]}),
    (Format.sharegpt, {"conversations": [said("human", "2+2?"), said("gpt", "4")]}, CHAT),
    (Format.sharegpt, {"conversations": [ASKED, GOOD]}, CHAT),
    (Format.sharegpt, {"conversations": [said("user", "2+2?"), said("assistant", "4")], "system": "Be brief."},
     {"kind": "chat", "messages": [SYSTEM, ASKED, GOOD]}),
    (Format.sharegpt,
     {"conversations": [said("human", "2+2?"), said("function_call", '{"name": "add", "arguments": {"a": 2, "b": 2}}'),
                        said("observation", "4"), said("gpt", "4")], "tools": "[]"},
     {"kind": "chat", "messages": [ASKED, CALLING, {"role": "tool", "content": "4"}, GOOD]}),
    (Format.alpaca, {"instruction": "2+2?", "input": "", "output": "4"}, CHAT),
    (Format.alpaca, {"instruction": "2+2?", "input": None, "output": "4", "text": "all of it"}, CHAT),
    (Format.alpaca, {"instruction": "Add", "input": "2+2", "output": "4", "system": "Be brief."},
     {"kind": "chat", "messages": [SYSTEM, {"role": "user", "content": "Add\n\n2+2"}, GOOD]}),
    (Format.alpaca, {"instruction": "2+2?", "output": "4", "history": [["Hello", "Hi"]]},
     {"kind": "chat", "messages": [*HELLO, ASKED, GOOD]}),
    (Format.prompt_completion, {"prompt": "2+2?", "completion": "4", "system": ""}, CHAT),
    (Format.prompt_completion, {"prompt": [ASKED], "completion": [GOOD]}, CHAT),
    (Format.question_answer, {"question": "2+2?", "answer": "4"}, CHAT),
    (Format.question_answer, {"question": "2+2?", "answer": "4", "context": "Sums."},
     {"kind": "chat", "messages": [{"role": "user", "content": "Sums.\n\n2+2?"}, GOOD]}),
    (Format.text, {"text": "2+2=4", "url": "x"}, {"kind": "text", "text": "2+2=4"}),
    (Format.preference, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, PAIR),
    (Format.preference, {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    (Format.preference, {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD}, PAIR),
    (Format.preference, {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, PAIR),
    (Format.preference,
     {"prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]}, PAIR),
    (Format.preference, {"chosen": [*HELLO, ASKED, GOOD], "rejected": [*HELLO, ASKED, BAD]},
     {**PAIR, "messages": [*HELLO, ASKED]}),
    (Format.preference,
     {"conversations": [said("human", "2+2?")], "chosen": said("gpt", "4"), "rejected": said("gpt", "5")}, PAIR),
    (Format.preference, {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5", "system": "Be brief."},
     {**PAIR, "messages": [SYSTEM, ASKED]}),
    (Format.preference, {"question": "2+2?", "chosen": "4", "rejected": "5"}, PAIR),
    (Format.unpaired, {"prompt": "2+2?", "completion": "4", "label": True}, WANTED),
    (Format.unpaired, {"messages": [ASKED, GOOD], "label": False}, {**WANTED, "label": "false"}),
    (Format.unpaired, {"prompt": [ASKED], "completion": [GOOD], "label": "True"}, WANTED),
    (Format.unpaired, {"instruction": "2+2?", "output": "4", "kto_tag": True}, WANTED),
    (Format.unpaired, {"conversations": [said("human", "2+2?"), said("gpt", "4")], "kto_tag": True}, WANTED),
    (Format.classification, {"text": "2+2", "label": "sum"},
     {"kind": "chat", "label": "sum", "messages": [TO_CLASSIFY, {"role": "assistant", "content": "sum"}]}),
    (Format.classification, {"text": "2+2", "label": 3.0, "system": "Be brief."},
     {"kind": "chat", "label": "3", "messages": [SYSTEM, TO_CLASSIFY, {"role": "assistant", "content": "3"}]}),
]
# fmt: on


@pytest.mark.parametrize(("format", "row", "expected"), FORMS)
def test_a_row_is_recognized_and_read(format: Format, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert draft(row).format is format
    assert content(row) == expected
    assert content(dict(reversed(row.items()))) == expected
    assert content(row, format=format) == expected
    assert content({**row, "other": None, "prompt_id": 7}) == expected


@pytest.mark.parametrize(
    ("row", "changes", "code", "reason"),
    [
        ({"prompt": "2+2?"}, {}, "unknown_format", r"keys are prompt, expected.*data\.columns"),
        ({}, {}, "unknown_format", "keys are none"),
        ({"prompt": "2+2?", "completion": None}, {}, "no_text", "turn 2 is null"),
        ({"prompt": "2+2?", "completion": "4"}, {"format": Format.alpaca}, "missing_field", "no 'instruction'"),
        ({"chosen": "4", "rejected": "5"}, {}, "missing_field", "no prompt beside chosen"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": 5}, {}, "no_text", "turn 1 is 5"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, {}, "same_answers", "the same"),
        ({"chosen": [ASKED, GOOD], "rejected": [HELLO[0], BAD]}, {}, "no_messages", "messages is"),
        ({"messages": [ASKED, GOOD], "label": 1}, {}, "bad_label", r"label is 1.*data\.format=messages"),
        ({"messages": [ASKED, GOOD], "label": None}, {}, "bad_label", "label is null"),
        ({"text": "2+2", "label": None}, {}, "bad_label", "label is empty"),
        ({"text": "2+2", "label": ["sum"]}, {}, "bad_label", "label is .*sum"),
        ({"label": True, "answer": "4"}, {"format": Format.unpaired}, "missing_field", "no conversation beside"),
        ({"text": 4, "label": "sum"}, {}, "no_text", "text is 4"),
        ({"instruction": " ", "input": "", "output": "4"}, {}, "empty_turn", "instruction is empty"),
        ({"instruction": "Add", "input": 2, "output": "4"}, {}, "no_text", "input is 2"),
        ({"instruction": "2+2?", "output": "4", "history": "Hello"}, {}, "bad_history", "list of"),
        ({"conversations": [said("human", "2+2?"), said("function_call", "add")]}, {}, "tool_call", "no JSON"),
        ({"conversations": "hello"}, {}, "no_messages", "messages is"),
        ({"conversations": [{"from": ["gpt"], "value": "4"}]}, {}, "role", "turn 1 is of"),
        ({"prompt": "2+2?", "completion": "4", "group": []}, {}, "bad_group", "group is"),
        ({"prompt": "2+2?", "completion": "4", "group": "\ud800"}, {}, "surrogate", "group"),
        ({"prompt": "2+2?", "completion": "4", "task": {}}, {}, "bad_task", "task is"),
        ({"prompt": "2+2?", "completion": "4", "fold": "b"}, {"split_column": "fold"}, "bad_split", "fold is .b.,"),
        ({"prompt": "2+2?", "completion": "4"}, {"split_column": "fold"}, "bad_split", "fold is null"),
    ],
)  # fmt: skip
def test_a_row_of_no_form_or_with_a_broken_field_is_rejected(
    row: dict[str, Any], changes: dict[str, Any], code: str, reason: str
) -> None:
    with pytest.raises(Unfit, match=reason) as unfit:
        content(row, **changes)
    assert unfit.value.code == code


def test_columns_are_renamed_before_anything_else() -> None:
    row = {"id": 1, "text": "2+2?", "prompt": "not this", "reply": "4", "customer": 7}
    named = {"prompt": "text", "completion": "reply", "group": "customer"}
    assert content(row, columns=named) == CHAT
    assert draft(row, columns=named).group == "7"
    assert content({"text": "2+2", "category": "sum"}, columns={"label": "category"})["label"] == "sum"


def test_the_official_split_comes_from_a_column_or_from_the_settings() -> None:
    pair = {"prompt": "2+2?", "completion": "4"}
    names = {"train": "train", "Training": "train", "valid": "validation", "dev": "validation", "eval": "test"}
    assert {name: draft({**pair, "fold": name}, split_column="fold").split for name in names} == names
    assert draft(pair, official="test").split == "test"
    assert draft({**pair, "split": "test"}).split is None


def test_the_task_of_a_row_is_its_own_or_that_of_its_kind() -> None:
    assert draft({"text": "Once."}).task == "text"
    assert draft({"text": "Once.", "label": "tale"}).task == "classification"
    assert draft({"prompt": "2+2?", "completion": "4"}).task == "chat"
    assert draft({"prompt": "2+2?", "completion": "4", "task": "sums"}).task == "sums"


def test_the_wording_of_stanford_alpaca_is_that_of_its_paper_with_and_without_input() -> None:
    row = {"instruction": "Add.", "output": "4"}
    worded = [
        content({**row, **more}, template="conf/prompt/alpaca.jinja")["messages"][0]["content"]
        for more in ({}, {"input": "2 and 2"})
    ]
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    assert worded == [
        f"Below is an instruction that describes a task. {request}### Response:",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        f"{request}### Input:\n2 and 2\n\n### Response:",
    ]


@pytest.fixture
def template(in_tmp: Path) -> Path:
    path = in_tmp / "conf/prompt/mine.jinja"
    path.parent.mkdir(parents=True)
    return path


def worded(row: dict[str, Any]) -> str:
    return str(content(row, template="conf/prompt/mine.jinja")["messages"][0]["content"])


def test_a_template_of_ones_own_words_the_question_from_any_field(template: Path) -> None:
    template.write_text("As a {{ trade }}: {{ prompt }}\n")
    assert worded({"prompt": "2+2?", "completion": "4", "trade": "clerk"}) == "As a clerk: 2+2?"


def test_what_a_row_says_is_never_run(template: Path) -> None:
    template.write_text("{{ prompt }}")
    hostile = "{{ 7 * 7 }}{% for x in range(9) %}{{ ''.__class__ }}{% endfor %}"
    assert worded({"prompt": hostile, "completion": "4"}) == hostile


@pytest.mark.parametrize("text", ["{{ missing }}", "{{ prompt.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ prompt + 1 }}"])
def test_a_template_that_fails_over_a_row_rejects_the_row(template: Path, text: str) -> None:
    template.write_text(text)
    with pytest.raises(Unfit, match=r"conf/prompt/mine\.jinja cannot word this row.*data\.template") as unfit:
        worded({"prompt": "2+2?", "completion": "4"})
    assert unfit.value.code == "template"


@pytest.mark.parametrize(
    "row", [{"messages": [ASKED, GOOD]}, {"text": "Once."}, {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}]
)
def test_a_template_is_not_silently_left_out(template: Path, row: dict[str, Any]) -> None:
    template.write_text("{{ prompt }}")
    with pytest.raises(Unfit, match=r"has nothing that conf/prompt/mine\.jinja could word"):
        content(row, template="conf/prompt/mine.jinja")


def test_a_template_that_is_none_or_lies_elsewhere_is_refused_before_any_row(template: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.template: found 'conf/prompt/mine\.jinja'.*No such file"):
        formats.templates(settings(template="conf/prompt/mine.jinja"))
    template.write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"data\.template: conf/prompt/mine\.jinja is no Jinja template"):
        formats.templates(settings(template="conf/prompt/mine.jinja"))
    for name in ("/etc/passwd", "conf/prompt/../data/x.jinja", "conf/prompt/chatml.yaml"):
        with pytest.raises(ConfigError, match=r"data\.template.*under conf/prompt"):
            settings(template=name)
