"""Rows on their way in: the rules that the content of a row must keep, and what is kept of a row that breaks one."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SPELLINGS = {  # of the roles, in the data that people have
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function": "tool",
}
NEXT = {"": ("user", "system"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
NEXT |= {"call": ("tool",), "tool": ("tool", "assistant")}
MAX_DEPTH = 50  # of the JSON in tools and tool calls
KEPT_CHARS = 2000  # of a rejected row: enough to recognize it


@dataclass(frozen=True)
class Rejection:
    """A row that is kept out of the data: where it stood (`file:line`), a code to count, a reason to read, the row."""

    where: str
    code: str
    reason: str
    row: str


class Unfit(Exception):
    """Why a row cannot be used: (code, reason)."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Unparsed(Unfit):
    """Why there is no row at all, with the text that stood in its place."""

    def __init__(self, code: str, reason: str, row: str) -> None:
        super().__init__(code, reason)
        self.row = row

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.reason, self.row)


def rejection(where: str, unfit: Unfit, row: Any) -> Rejection:
    """The rejection of a row; the row is kept as text that any reader can take, shortened."""
    return Rejection(where, unfit.code, _printable(unfit.reason), _printable(_text_of(row)[:KEPT_CHARS]))


def checked(content: Mapping[str, Any], max_chars: int) -> dict[str, Any]:
    """The content of a row (the keys of records.make, unchecked) in the one form that records have.

    kind         messages                                 besides
    chat         [system] user assistant [...]            the last turn is an assistant's
    text                                                  text says something
    preference   [system] user [...]                      chosen and rejected go on from there and differ
    unpaired     as chat                                  label is "true" or "false"

    Tools are asked only by an assistant, and answered before anyone else speaks:

        user  assistant(calls)  tool [tool ...]  assistant

    Args: max_chars: longest row, characters of all its texts together.
    Raises: Unfit, naming the first rule that is broken.
    """
    found = dict(content)
    found["tools"] = _tools(content["tools"])
    if content["kind"] == "text":
        found["text"] = _said("the text", content["text"], "empty_text")
    elif content["kind"] == "preference":
        prompt = found["messages"] = turns(content["messages"], "messages")
        for key in ("chosen", "rejected"):
            found[key] = turns(content[key], key)
            _check_order([*prompt, *found[key]], f"{key}: ")
        if prompt[-1]["role"] not in ("user", "tool"):
            raise Unfit("no_question", f"the prompt ends with a turn of {prompt[-1]['role']}, expected the user's")
        if found["chosen"] == found["rejected"]:
            raise Unfit("same_answers", "chosen and rejected are the same")
    else:
        found["messages"] = turns(content["messages"], "messages")
        _check_order(found["messages"])
    if content["kind"] == "unpaired" and content["label"] not in ("true", "false"):
        raise Unfit("bad_label", f"label is {shown(content['label'])}, expected true or false")
    if (length := chars(found)) > max_chars:
        raise Unfit("too_long", f"{length} characters, data.max_chars is {max_chars}")
    return found


def chars(content: Mapping[str, Any]) -> int:
    """Characters of all texts of a row; of tools and tool calls those of their JSON."""
    total = len(content["text"] or "")
    for key in ("messages", "chosen", "rejected"):
        for turn in content[key] or ():
            for said, value in turn.items():
                if said in ("content", "reasoning_content"):
                    total += len(value)
                elif said == "tool_calls":
                    total += len(json.dumps(value, ensure_ascii=False))
    return total + (len(json.dumps(content["tools"], ensure_ascii=False)) if content["tools"] else 0)


def turns(messages: Any, name: str) -> list[dict[str, Any]]:
    """Turns, each checked by itself, with the keys of records.TURN that they need and no others.

    Args: name: the field they stand in, for messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise Unfit("no_messages", f"{name} is {shown(messages)}, expected a list of turns")
    return [_turn(number, message) for number, message in enumerate(messages, start=1)]


def _turn(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise Unfit("no_turn", f"turn {number} is {shown(message)}, expected an object with role and content")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in SPELLINGS:
        raise Unfit("role", f"turn {number} is of {shown(role)}, expected one of {', '.join(ROLES)}")
    turn: dict[str, Any] = {"role": SPELLINGS[role]}
    role = turn["role"]
    if type(content) is not str:
        content = _joined(number, message, has_calls=bool(calls))
    if content and not content.isspace():
        if "\x00" in content or not content.isascii():
            check_text(f"turn {number}", content)
        turn["content"] = content
    elif role == "tool":
        turn["content"] = content  # a tool may have nothing to say
    elif not (role == "assistant" and calls):
        raise Unfit("empty_answer" if role == "assistant" else "empty_turn", f"turn {number} ({role}) is empty")
    if len(message) == 2 and not calls:
        return turn
    if role == "assistant":
        thoughts = message.get("reasoning_content")
        if thoughts is not None and not isinstance(thoughts, str):
            raise Unfit("no_text", f"the reasoning_content of turn {number} is {shown(thoughts)}, expected text")
        if thoughts and not thoughts.isspace():
            turn["reasoning_content"] = check_text(f"turn {number}", thoughts)
        if calls:
            turn["tool_calls"] = _calls(number, calls)
    elif calls:
        raise Unfit("tool_call", f"turn {number} is of {role} and calls a tool, which only an assistant may")
    elif role == "tool":
        for key in ("tool_call_id", "name"):
            if (value := message.get(key)) is not None:
                turn[key] = _name("tool_answer", f"{key} of turn {number}", value)
    return turn


def _joined(number: int, message: Mapping[str, Any], *, has_calls: bool) -> str:
    """The text of a turn whose content is no plain text: parts of text put together, nothing beside a tool call."""
    content = message.get("content")
    if content is None and has_calls:
        return ""
    if "content" not in message:
        raise Unfit("no_turn", f"turn {number} is {shown(message)}, expected an object with role and content")
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
        raise Unfit("no_text", f"the content of turn {number} is {shown(content)}, expected text")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Unfit("content_part", f"turn {number} holds {shown(part)}, only parts of type text can be learned")
    return "".join(part["text"] for part in content)


def _check_order(turns: Sequence[Mapping[str, Any]], where: str = "") -> None:
    """Who may speak after whom; see `checked`."""
    roles = [turn["role"] for turn in turns]
    if roles in (["user", "assistant"], ["system", "user", "assistant"]) and "tool_calls" not in turns[-1]:
        return
    if "assistant" not in roles:
        raise Unfit("no_assistant", f"{where}no turn of the assistant: there is nothing to learn")
    before = ""
    calls: list[Any] = []
    for number, (role, turn) in enumerate(zip(roles, turns, strict=True), start=1):
        if role == "tool":
            _check_tool_answer(f"{where}turn {number}", turn, before, calls)
        elif role not in NEXT[before]:
            rule = "a call waits for its answer" if before == "call" else "user and assistant take turns"
            raise Unfit("role_order", f"{where}turn {number} is of {role}, expected {NEXT[before][0]}: {rule}")
        before = role
        if role == "assistant":
            calls = [call.get("id") for call in turn.get("tool_calls", ())]
            before = "call" if calls else role
    if roles[-1] != "assistant":
        raise Unfit("no_last_answer", f"{where}the last turn is of {roles[-1]}, expected the assistant's answer")


def _check_tool_answer(where: str, turn: Mapping[str, Any], before: str, calls: list[Any]) -> None:
    """Take the call that a tool's turn answers off the list of those that wait."""
    if before not in ("call", "tool") or not calls:
        raise Unfit("tool_answer", f"{where} is of a tool, but no call waits for an answer")
    asked = turn.get("tool_call_id")
    if asked is None or calls == [None] * len(calls):
        calls.pop(0)
    elif asked in calls:
        calls.remove(asked)
    else:
        raise Unfit("tool_answer", f"{where} answers the call {shown(asked)}, waiting are {shown(calls)}")


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls as OpenAI and bare ({"name", "arguments"}) data have them, as values or as JSON text."""
    where = f"the tool call of turn {number}"
    calls = _parsed("tool_call", where, calls)
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, Sequence) or not calls:
        raise Unfit("tool_call", f"{where} is {shown(calls)}, expected a name and arguments, or a list of such")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) and "function" in call else call
        if not isinstance(function, Mapping) or "name" not in function:
            raise Unfit("tool_call", f"{where} is {shown(call)}, expected a name and arguments")
        name = _name("tool_call", f"the name in {where}", function["name"])
        arguments = _parsed("tool_call", f"arguments of {where}", function.get("arguments") or {})
        if not isinstance(arguments, Mapping):
            raise Unfit("tool_call", f"arguments of {where} are {shown(arguments)}, expected an object")
        value = {"name": name, "arguments": _json_value("tool_call", where, arguments)}
        made: dict[str, Any] = {"type": "function", "function": value}
        if (id := call.get("id")) is not None:
            made["id"] = _name("tool_call", f"the id of {where}", id)
        found.append(made)
    return found


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools a row offers, OpenAI's or bare ({"name", "parameters", ...}), as values or as JSON text."""
    if tools is None or tools == "":
        return None
    tools = _parsed("tools", "tools", tools)
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise Unfit("tools", f"tools is {shown(tools)}, expected a list of functions")
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) and "function" in tool else tool
        if not isinstance(function, Mapping) or "name" not in function:
            raise Unfit("tools", f"tools holds {shown(tool)}, expected a function with a name")
        _name("tools", "the name of a tool", function["name"])
        found.append({"type": "function", "function": _json_value("tools", "tools", function)})
    return found or None


def _parsed(code: str, where: str, value: Any) -> Any:
    """JSON text as its value, other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as fault:
        raise Unfit(code, f"{where}: no JSON ({fault})") from None


def _json_value(code: str, where: str, value: Any, depth: int = 0) -> Any:
    """A value that can be written as JSON and read again."""
    if depth > MAX_DEPTH:
        raise Unfit(code, f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return check_text(where, value)
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {check_text(where, str(key)): _json_value(code, where, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(code, where, item, depth + 1) for item in value]
    raise Unfit(code, f"{where}: holds {shown(value)}, which is no JSON")


def _name(code: str, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unfit(code, f"{where} is {shown(value)}, expected text")
    return check_text(where, value)


def _said(where: str, value: Any, code: str) -> str:
    if not isinstance(value, str):
        raise Unfit("no_text", f"{where} is {shown(value)}, expected text")
    if not value.strip():
        raise Unfit(code, f"{where} is empty")
    return check_text(where, value)


def check_text(where: str, text: str) -> str:
    """The text, if it can be written and shown everywhere.

    Raises: Unfit, for a NUL character (ends a text in many programs) and for half a character.
    """
    if "\x00" in text:
        raise Unfit("nul", f"{where} holds a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Unfit("surrogate", f"{where} holds half a character (a lone surrogate)") from None
    return text


def shown(value: Any) -> str:
    """A value in an error message: what it is, and its beginning."""
    text = _text_of(value, ensure_ascii=True) if not isinstance(value, str) else json.dumps(value[:60])
    return text if len(text) <= 60 else text[:57] + "..."


def _text_of(row: Any, *, ensure_ascii: bool = False) -> str:
    try:
        return row if isinstance(row, str) else json.dumps(row, ensure_ascii=ensure_ascii, default=str)
    except (TypeError, ValueError, RecursionError) as fault:
        return f"{type(row).__name__} that cannot be shown: {fault}"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
