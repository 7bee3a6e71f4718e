"""Rows on their way in: the rules a conversation must keep, and what is kept of a row that breaks one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
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


def rejection(where: str, unfit: Unfit, row: Any) -> Rejection:
    """The rejection of a row; the row is kept as text that any reader can take, shortened."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    printable = text[:KEPT_CHARS].encode("utf-8", "backslashreplace").decode("utf-8")
    return Rejection(where, unfit.code, unfit.reason, printable)


def conversation(messages: Any, max_chars: int) -> list[dict[str, str]]:
    """Check a list of {role, content} and return it without other keys.

        [system] user assistant [user assistant ...]     the last turn is an assistant's, no turn is empty

    Args: max_chars: longest conversation, characters of all turns together.
    Raises: Unfit, naming the first rule that is broken.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise Unfit("no_messages", f"messages is {_shown(messages)}, expected a list of turns")
    turns = [_turn(number, message) for number, message in enumerate(messages, start=1)]
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise Unfit("no_assistant", "no turn of the assistant: there is nothing to learn")
    spoken = roles[1:] if roles[0] == "system" else roles
    for number, (found, expected) in enumerate(zip(spoken, ["user", "assistant"] * len(spoken), strict=False)):
        if found != expected:
            position = number + 1 + len(roles) - len(spoken)
            raise Unfit(
                "role_order", f"turn {position} is of {found}, expected {expected}: user and assistant take turns"
            )
    if roles[-1] != "assistant":
        raise Unfit("no_last_answer", f"the last turn is of {roles[-1]}, expected the assistant's answer")
    if (length := sum(len(turn["content"]) for turn in turns)) > max_chars:
        raise Unfit("too_long", f"{length} characters, data.max_chars is {max_chars}")
    return turns


def _turn(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise Unfit("no_turn", f"turn {number} is {_shown(message)}, expected an object with role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise Unfit("role", f"turn {number} is of {_shown(role)}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Unfit("no_text", f"the content of turn {number} is {_shown(content)}, expected text")
    if not content.strip():
        code = "empty_answer" if role == "assistant" else "empty_turn"
        raise Unfit(code, f"turn {number} ({role}) is empty")
    if "\x00" in content:
        raise Unfit("nul", f"turn {number} holds a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        raise Unfit("surrogate", f"turn {number} holds half a character (a lone surrogate)")
    return {"role": role, "content": content}


def _shown(value: Any) -> str:
    """A value in an error message: what it is, and its beginning."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
