"""The forms in which people write rows down, each brought to the content of a record; rows.checked judges it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.lib.errors import ConfigError
from stages.lib.rows import Unfit, check_text, shown
from stages.lib.schema.data import Data, Format

TEMPLATES = Path(__file__).resolve().parents[2] / "conf/prompt"
OWN_TEMPLATE = {  # what words the question where data.template does not
    Format.alpaca: "instruction.jinja",
    Format.question_answer: "question.jinja",
    Format.classification: "classification.jinja",
}
ASKED = {  # the key of what is asked, in the formats that write no turns: those that a template can word
    Format.alpaca: "instruction",
    Format.prompt_completion: "prompt",
    Format.question_answer: "question",
    Format.classification: "text",
}
CONVERSATIONS = {  # formats that give a conversation, and the keys by which a row is known; more telling ones first
    Format.messages: ("messages",),
    Format.sharegpt: ("conversations",),
    Format.alpaca: ("instruction", "output"),
    Format.prompt_completion: ("prompt", "completion"),
    Format.question_answer: ("question", "answer"),
}
TASKS = {Format.text: "text", Format.preference: "preference", Format.unpaired: "unpaired"}
TASKS |= {Format.classification: "classification"}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "eval"), "test"),
}
NOTHING = dict.fromkeys(("messages", "tools", "text", "chosen", "rejected", "label"))

Row = Mapping[str, Any]
Turn = Mapping[str, Any]


class Draft(NamedTuple):
    """A row on its way to a record. content: the keys of records.make that its id is made of, not yet checked."""

    format: Format
    content: dict[str, Any]
    split: str | None
    group: str
    task: str


class Wording(NamedTuple):
    """How the user's turn is worded: data.template, and the texts of all templates by name (see `templates`)."""

    template: str | None
    texts: Mapping[str, str]


def draft(row: Row, data: Data, texts: Mapping[str, str]) -> Draft:
    """What a row says, whatever its form; a key whose value is null counts as absent, but for the label.

    Args: texts: of the templates, see `templates`.
    Raises: Unfit, when the row has no known form, or lacks a field of the one that data.format names.
    """
    row = _renamed(row, data.columns)
    format = detected(row) if data.format is Format.auto else data.format
    return Draft(
        format,
        {**NOTHING, **_MAKERS[format](row, Wording(data.template, texts))},
        _split(row, data),
        _label(row, "group", "bad_group", otherwise=""),
        _label(row, "task", "bad_task", otherwise=TASKS.get(format, "chat")),
    )


def detected(row: Row) -> Format:
    """The format whose keys a row has; those with a value count first.

    Raises: Unfit, when they are none's.
    """
    format = _known(_filled(row), "label" in row) or _known(frozenset(row), "label" in row)
    if format:
        return format
    known = {**CONVERSATIONS, Format.preference: ("chosen", "rejected"), Format.text: ("text",)}
    forms = "; ".join(f"{format}: {', '.join(keys)}" for format, keys in known.items())
    raise Unfit(
        "unknown_format",
        f"its keys are {_keys(row)}, expected those of a known format ({forms}). "
        "Name your columns: -S '+data.columns={prompt: <column>, completion: <column>}'",
    )


@functools.lru_cache
def _known(keys: frozenset[str], has_label: bool) -> Format | None:
    if keys.issuperset(("chosen", "rejected")):
        return Format.preference
    if format := _conversational(keys):
        return Format.unpaired if has_label else format
    if "text" in keys:
        return Format.classification if has_label else Format.text
    return None


def _conversational(keys: frozenset[str]) -> Format | None:
    return next((format for format, needed in CONVERSATIONS.items() if keys.issuperset(needed)), None)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row by the names of schema.data.FIELDS."""
    if columns:
        kept = {key: value for key, value in row.items() if key not in columns}
        row = kept | {field: row[column] for field, column in columns.items() if column in row}
    if "kto_tag" in row and "label" not in row:
        row = {**row, "label": row["kto_tag"]}
    return row


# --- one function a format: (row, wording) -> keys of records.make


def _chat(format: Format, row: Row, wording: Wording) -> dict[str, Any]:
    return {"kind": "chat", "messages": _turns(format, row, wording), "tools": row.get("tools")}


def _text(row: Row, wording: Wording) -> dict[str, Any]:
    _refuse_template(Format.text, wording)
    return {"kind": "text", "text": _field(row, "text")}


def _classification(row: Row, wording: Wording) -> dict[str, Any]:
    label = _label(row, "label", "bad_label", otherwise="")
    if not label.strip():
        raise Unfit("bad_label", "label is empty, expected the name of a class")
    messages = [*_system(row), _user(_asked(Format.classification, row, wording)), _assistant(label)]
    return {"kind": "chat", "messages": messages, "label": label}


def _unpaired(row: Row, wording: Wording) -> dict[str, Any]:
    """Prompt, one answer, and whether it is wanted."""
    label = _field(row, "label")
    if isinstance(label, str):
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise Unfit(
            "bad_label",
            f"label is {shown(label)}, expected true or false. If it says something else than whether the answer is "
            "wanted, name the format: data.format=messages",
        )
    format = _conversational(_filled(row))
    if format is None:
        raise Unfit("missing_field", f"no conversation beside the label, its keys are {_keys(row)}")
    return {**_chat(format, row, wording), "kind": "unpaired", "label": "true" if label else "false"}


def _preference(row: Row, wording: Wording) -> dict[str, Any]:
    """A prompt and the two ways to go on, as texts, turns or lists of turns.

    Where both lists tell the whole conversation, the prompt is what they have in common:

        chosen [user assistant(a)]  rejected [user assistant(b)]  ->  user | assistant(a) | assistant(b)
    """
    chosen, rejected = (_answers(_field(row, key)) for key in ("chosen", "rejected"))
    if _begins_with_question(chosen) and _begins_with_question(rejected):
        _refuse_template(Format.preference, wording)
        common = 0
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    else:
        prompt = _prompt(row, wording)
    found = {"messages": _listed(_system(row), prompt), "chosen": chosen, "rejected": rejected}
    return {"kind": "preference", **found, "tools": row.get("tools")}


_MAKERS: dict[Format, Callable[[Row, Wording], dict[str, Any]]] = {
    **{format: functools.partial(_chat, format) for format in CONVERSATIONS},
    Format.text: _text,
    Format.classification: _classification,
    Format.unpaired: _unpaired,
    Format.preference: _preference,
}


# --- turns


def _turns(format: Format, row: Row, wording: Wording) -> Any:
    """The turns of a conversation as its format writes them down, by OpenAI's names, unchecked."""
    if format in (Format.messages, Format.sharegpt):
        _refuse_template(format, wording)
        return _listed(_system(row), _field(row, CONVERSATIONS[format][0]))
    asked, answer = (_field(row, key) for key in CONVERSATIONS[format])
    if isinstance(asked, list):  # prompt and completion may be turns, too
        _refuse_template(format, wording)
        return _listed([*_system(row)], [*asked, *_answers(answer)])
    question = _user(_asked(format, row, wording))
    return [*_system(row), *_history(row), question, *_answers(answer)]


def _prompt(row: Row, wording: Wording) -> Any:
    """What a preference's answers answer."""
    keys = _filled(row)
    if isinstance(row.get("prompt"), list):
        _refuse_template(Format.preference, wording)
        return row["prompt"]
    for format in (Format.prompt_completion, Format.sharegpt, Format.messages, Format.alpaca, Format.question_answer):
        if (key := CONVERSATIONS[format][0]) in keys:
            if format in ASKED:
                return [*_history(row), _user(_asked(format, row, wording))]
            _refuse_template(format, wording)
            return row[key]
    raise Unfit("missing_field", f"no prompt beside chosen and rejected, its keys are {_keys(row)}")


def _listed(before: Sequence[Turn], turns: Any) -> Any:
    return [*before, *(_turn(turn) for turn in turns)] if isinstance(turns, list) else turns


def _turn(turn: Any) -> Any:
    """ShareGPT's {"from", "value"} by OpenAI's names; anything else as it is."""
    if not isinstance(turn, Mapping) or "role" in turn or "from" not in turn:
        return turn
    said = {**turn, "role": turn["from"], "content": turn.get("value")}
    if turn["from"] == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": turn.get("value") or "null"}
    return said


def _answers(value: Any) -> list[Any]:
    """An answer as turns: a text, one turn, or turns."""
    if isinstance(value, list):
        return [_turn(turn) for turn in value]
    return [_turn(value) if isinstance(value, Mapping) else _assistant(value)]


def _begins_with_question(turns: Sequence[Any]) -> bool:
    first = turns[0] if turns else None
    return isinstance(first, Mapping) and first.get("role") in ("system", "developer", "user", "human")


def _system(row: Row) -> list[Turn]:
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return []
    return [{"role": "system", "content": system}]


def _history(row: Row) -> list[Turn]:
    """Alpaca's earlier turns: [[question, answer], ...]."""
    history = row.get("history")
    if history is None or history == "":
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unfit("bad_history", f"history is {shown(history)}, expected a list of [question, answer]")
    return [turn for question, answer in history for turn in (_user(question), _assistant(answer))]


def _user(content: Any) -> Turn:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> Turn:
    return {"role": "assistant", "content": content}


# --- wording


def templates(data: Data) -> dict[str, str]:
    """The text of every template that the rows of these settings may need, by the name that names it.

    Raises: ConfigError, when data.template is missing or no Jinja template.
    """
    paths = {name: TEMPLATES / name for name in OWN_TEMPLATE.values()}
    paths |= {settings.template: Path(settings.template) for settings in data.each().values() if settings.template}
    texts = {}
    for name, path in paths.items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
            _compiled(texts[name])
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"data.template: found {name!r}, expected a readable Jinja file ({fault}).") from None
        except jinja2.TemplateError as fault:
            raise ConfigError(f"data.template: {name} is no Jinja template: {fault}") from None
    return texts


def _asked(format: Format, row: Row, wording: Wording) -> Any:
    """The user's words: those of the row, put into the template."""
    key = ASKED[format]
    name = wording.template or OWN_TEMPLATE.get(format)
    if name is None:
        return _field(row, key)
    said = _field(row, key)
    extra = row.get("input") if format is Format.alpaca else None
    for value in (said, extra):
        if value is not None and not isinstance(value, str):
            raise Unfit("no_text", f"{key} is {shown(said)}, input is {shown(extra)}, expected text")
    if not f"{said or ''}{extra or ''}".strip():
        raise Unfit("empty_turn", f"{key} is empty")
    try:
        return _compiled(wording.texts[name]).render({k: value for k, value in row.items() if value is not None})
    except Exception as fault:  # a template may fail in any way over a row's values
        raise Unfit("template", f"{name} cannot word this row: {fault}. Change data.template or the row") from None


def _refuse_template(format: Format, wording: Wording) -> None:
    if wording.template:
        raise Unfit("template", f"a row of {format} has nothing that {wording.template} could word: no data.template")


@functools.lru_cache
def _compiled(text: str) -> jinja2.Template:
    """Rows are values for a template, never a part of it; it reaches nothing but them."""
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(text)


# --- fields


def _field(row: Row, key: str) -> Any:
    if key not in row:
        raise Unfit("missing_field", f"no {key!r}, it has {_keys(row)}")
    return row[key]


def _filled(row: Row) -> frozenset[str]:
    return frozenset([key for key, value in row.items() if value is not None])


def _keys(row: Row) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "none"


def _label(row: Row, key: str, code: str, *, otherwise: str) -> str:
    """A name the user gave a row: its group, task or class; whole numbers count as names.

    A table turns a column of numbers with gaps into floats: 3.0 is the name 3, NaN is a gap.

    Raises: Unfit with `code`, for a value that is no name; unnamed, such rows would each be a group of their own.
    """
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value or value == "":
        return otherwise
    if not isinstance(value, (str, int)):
        raise Unfit(
            code, f"{key} is {shown(value)}, expected text or a whole number. Change the column, or data.columns"
        )
    return check_text(key, str(value))


def _split(row: Row, data: Data) -> str | None:
    """The official split of a row: data.official, or what its column says."""
    if data.split_column is None:
        return data.official
    value = row.get(data.split_column)
    name = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if name is None:
        raise Unfit(
            "bad_split", f"{data.split_column} is {shown(value)}, expected {', '.join(SPLIT_NAMES)} (data.split_column)"
        )
    return name
