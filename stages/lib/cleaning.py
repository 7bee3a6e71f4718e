"""What is changed in a row, or makes it unwanted, before it becomes a record; each change and rejection is counted."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from stages.lib import languages, pii, rows
from stages.lib.schema.data import Clean, Policy, Unicode

TURNS = ("messages", "chosen", "rejected")
MAX_REFUSAL_CHARS = 600  # a longer text says more than no
_EMPTY_LINES = re.compile(r"\n{3,}")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
_OPENINGS = (
    "i'm sorry", "i am sorry", "sorry", "i apologize", "i apologise", "my apologies", "apologies", "unfortunately",
    "as an ai", "as a language model", "as a large language model", "i can't", "i cannot", "i can not", "i'm unable",
    "i am unable", "i'm not able", "i am not able", "i'm just an ai", "i am just an ai", "i'm an ai", "i am an ai",
)  # fmt: skip
_UNABLE = r"i(?:(?: can(?:no|')t| can not| won't be able to| must decline to)|(?: am|'m) (?:unable|not able) to)"
_SERVING = (
    r"(?:help|assist|provide|fulfill?|comply|answer|generate|create|write|complete|engage|discuss|support|do that|"
    r"process|access|browse|offer|produce|give|respond|continue|participate|share|perform)"
)
_SORRY = r"(?:(?:(?:i'm|i am|we're) )?(?:very |so |really )?sorry\b|(?:i|my) apolog\w+\b|unfortunately\b)"
_REFUSAL = re.compile(  # one open stretch at most of each kind: more of them could be divided in too many ways
    rf"(?:(?:but|and) )?(?:{_SORRY}[^.!?]{{0,60}}?\b)?"
    r"(?:(?:as|i'm|i am|i'm just|i am just) an? (?:ai|(?:large )?language model)\b[^.!?]{0,80}?"
    rf"\b(?:i (?:do not|don't|am not|have no|lack)\b|{_UNABLE}).*|{_UNABLE}(?: \w+ly)? {_SERVING}\b.*)",
    re.DOTALL,
)
_COURTESY = re.compile(
    r"(?:please (?:let me know|feel free|try|provide|ask)|(?:is|was) there (?:anything|something) else|"
    r"(?:(?:how|what) (?:else )?)?(?:can|may) i (?:help|assist|do)\b|let me know|feel free|"
    rf"if you (?:have|need|would like)|thank you|thanks|i hope\b|{_SORRY}).*",
    re.DOTALL,
)
_TURN_OF_MEANING = re.compile(
    r"\b(?:however|but (?:here|i can\b(?!'| not)|you can)|instead,|here (?:is|are)|here's|that said)"
)


def clean(draft: dict[str, Any], settings: Clean, counts: Counter[str]) -> dict[str, Any]:
    """The content of a row as the settings want it: the same object when nothing changes.

    Args: draft: kind, messages, tools, text, chosen, rejected, label, as records.make takes them.
        counts: gets cleaned/{unicode,whitespace,refusals} in rows, and pii/<kind> in places found.
    Raises: rows.Unfit, with one of the codes refusal, short_answer, long_answer, answer_ratio, wrong_language, pii. No
        reason shows anything of the text.

    Every text of the row is looked at, arguments of tool calls and tools included; blanks inside those are left alone.
    Group, source and task are not: names of persons there are the user's to take out.
    """
    if settings.unicode is not Unicode.keep:
        form: Literal["NFC", "NFKC"] = "NFC" if settings.unicode is Unicode.nfc else "NFKC"
        draft = _changed(draft, lambda text: unicodedata.normalize(form, text), counts, "unicode")
    if settings.whitespace:
        draft = _changed(draft, _without_needless_blanks, counts, "whitespace", inside=False)
    if any(policy is not Policy.ignore for policy in settings.pii.values()):
        draft = _without_pii(draft, settings.pii, counts)
    _judge_answers(draft, settings, counts)
    if settings.languages:
        _judge_language(draft, settings.languages, counts)
    return draft


# --- texts of a draft


def _texts(draft: Mapping[str, Any]) -> list[str]:
    """Every text of a row."""
    found = [draft["text"]] if draft["text"] is not None else []
    for key in TURNS:
        for turn in draft[key] or ():
            if turn.get("content"):
                found.append(turn["content"])
            if turn.get("reasoning_content"):
                found.append(turn["reasoning_content"])
            if turn.get("tool_calls"):
                found += _leaves(turn["tool_calls"])
    if draft["tools"]:
        found += _leaves(draft["tools"])
    return found


def _leaves(value: Any) -> Iterator[str]:
    """Every text inside a value of JSON; a number counts as its digits."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _rewritten(draft: dict[str, Any], change: Callable[[str], str], *, inside: bool = True) -> dict[str, Any]:
    """The draft with each text changed; `inside` those of JSON values (tool calls, tools) too, keys excepted."""

    def of_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
        new = dict(turn)
        for key in ("content", "reasoning_content"):
            if new.get(key):
                new[key] = change(new[key])
        if inside and new.get("tool_calls"):
            new["tool_calls"] = _inside(new["tool_calls"], change)
        return new

    new = {**draft, "text": None if draft["text"] is None else change(draft["text"])}
    for key in TURNS:
        if draft[key] is not None:
            new[key] = [of_turn(turn) for turn in draft[key]]
    if inside and draft["tools"]:
        new["tools"] = _inside(draft["tools"], change)
    return new


def _inside(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return _inside_text(value, change)
    if isinstance(value, Mapping):
        return {key: _inside(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_inside(item, change) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return value if (new := change(str(value))) == str(value) else new
    return value


def _inside_text(text: str, change: Callable[[str], str]) -> str:
    """Arguments may be JSON in a text: what changes in it must not break it."""
    if text[:1] not in ("{", "["):
        return change(text)
    try:
        value = json.loads(text)
        new = _inside(value, change)
        return text if new == value else json.dumps(new, ensure_ascii=False)
    except (ValueError, RecursionError):
        return change(text)


# --- changes


def _changed(
    draft: dict[str, Any], change: Callable[[str], str], counts: Counter[str], what: str, *, inside: bool = True
) -> dict[str, Any]:
    new = _rewritten(draft, change, inside=inside)
    if new == draft:
        return draft
    counts[f"cleaned/{what}"] += 1
    return new


def _without_needless_blanks(text: str) -> str:
    lines = "\n".join([line.rstrip() for line in text.split("\n")])  # a regular expression takes n^2 on n blanks
    return _EMPTY_LINES.sub("\n\n", lines).strip()


def _without_pii(draft: dict[str, Any], policies: Mapping[str, Policy], counts: Counter[str]) -> dict[str, Any]:
    texts = _texts(draft)
    if not pii.may_hold("\n\n".join(texts)):
        return draft
    found = Counter(one.kind for text in texts for one in pii.found(text))
    wanted = {kind: policies[kind] for kind in sorted(found) if policies.get(kind, Policy.ignore) is not Policy.ignore}
    for kind in wanted:
        counts[f"pii/{kind}"] += found[kind]
    if refused := [kind for kind, policy in wanted.items() if policy is Policy.reject]:
        shown = ", ".join(f"{kind} ({found[kind]})" for kind in refused)
        raise rows.Unfit("pii", f"holds {shown}, which data.clean.pii rejects")
    if redacted := {kind for kind, policy in wanted.items() if policy is Policy.redact}:
        return _rewritten(draft, lambda text: _redacted(text, redacted))
    return draft


def masked(row: Any, policies: Mapping[str, Policy]) -> Any:
    """A rejected row, or the reason, as it may be kept: without what the policies redact or reject.

    Args: row: any value of JSON; what is not one of JSON's stays. policies: data.clean.pii.
    """
    if not (kinds := {kind for kind, policy in policies.items() if policy in (Policy.redact, Policy.reject)}):
        return row
    try:
        return _inside(row, lambda text: _redacted(text, kinds))
    except RecursionError:
        return "<nested too deeply to be looked through>"


def _redacted(text: str, kinds: Collection[str]) -> str:
    return pii.redacted(text, [one for one in pii.found(text) if one.kind in kinds])


# --- judgements


def _judge_answers(draft: Mapping[str, Any], settings: Clean, counts: Counter[str]) -> None:
    """Refusals and lengths of every answer that may be learned."""
    has_refusal = False
    for asked, answer, is_wanted in _answers(draft):
        if is_wanted and settings.refusals is not Policy.ignore and is_refusal(answer):
            has_refusal = True
        size = len(answer)
        if size < settings.min_answer_chars:
            raise rows.Unfit(
                "short_answer", f"{size} characters, data.clean.min_answer_chars is {settings.min_answer_chars}"
            )
        if settings.max_answer_chars is not None and size > settings.max_answer_chars:
            raise rows.Unfit(
                "long_answer", f"{size} characters, data.clean.max_answer_chars is {settings.max_answer_chars}"
            )
        if settings.max_answer_ratio is not None and asked and size > settings.max_answer_ratio * asked:
            reason = f"{size} characters to {asked} asked, data.clean.max_answer_ratio is {settings.max_answer_ratio}"
            raise rows.Unfit("answer_ratio", reason)
    if has_refusal:
        counts["cleaned/refusals"] += 1
        if settings.refusals is Policy.reject:
            raise rows.Unfit("refusal", "an answer is nothing but a refusal, which data.clean.refusals rejects")


def _answers(draft: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """(characters it answers, answer, whether it is one to imitate) of each answer; a class is none, nor a tool call.

    What an answer answers are the turns since the one before, the system's aside. A text answers nothing: 0 characters.
    """
    if draft["kind"] == "text":
        yield 0, draft["text"], True
    if draft["kind"] == "chat" and draft["label"] is not None:
        return
    asked = 0
    for turn in draft["messages"] or ():
        content = turn.get("content") or ""
        if turn["role"] != "assistant":
            asked += len(content) if turn["role"] != "system" else 0
        elif content:
            yield asked, content, draft["kind"] != "unpaired" or draft["label"] == "true"
            asked = 0
    for key in ("chosen", "rejected"):
        since = asked
        for turn in draft[key] or ():
            content = turn.get("content") or ""
            if turn["role"] != "assistant":
                since += len(content)
            elif content:
                yield since, content, key == "chosen"
                since = 0


def is_refusal(text: str) -> bool:
    """Whether an English answer is boilerplate and nothing else: no sentence but refusal and courtesy.

    As an AI language model, I cannot do that. Is there anything else?     yes
    I'm sorry, but I can't open links. However, the title suggests ...     no
    """
    if len(text) > MAX_REFUSAL_CHARS:
        return False
    beginning = text[:32].lstrip().lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if not beginning.startswith(_OPENINGS):
        return False
    plain = text.strip().lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if _TURN_OF_MEANING.search(plain):
        return False
    sentences = [sentence for sentence in _SENTENCES.split(plain) if sentence]
    refused = [bool(_REFUSAL.fullmatch(sentence)) for sentence in sentences]
    return any(refused) and all(
        is_no or bool(_COURTESY.fullmatch(sentence)) for sentence, is_no in zip(sentences, refused, strict=True)
    )


def _judge_language(draft: Mapping[str, Any], wanted: Sequence[str], counts: Counter[str]) -> None:
    """By the answers; by the whole conversation where those are too short; not at all where that is, too."""
    if draft["kind"] == "chat" and draft["label"] is not None:
        answers = ""
    else:
        answers = "\n".join(answer for _, answer, _ in _answers(draft))
    found = languages.language(answers)
    if found is None:
        spoken = [turn for key in TURNS for turn in draft[key] or () if turn["role"] in ("user", "assistant")]
        found = languages.language("\n".join([turn.get("content") or "" for turn in spoken]))
    if found is None:
        counts["cleaned/language_unclear"] += 1
    elif found not in wanted:
        raise rows.Unfit("wrong_language", f"is in {found!r}, data.clean.languages are {', '.join(wanted)}")
