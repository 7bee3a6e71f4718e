"""Noisy twins: a row once more with slips of the keyboard in the user's turns, so that a tuned model bears them."""

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from stages.lib import records
from stages.lib.schema.data import Noise

_WORD = re.compile(r"[A-Za-z]{3,}")  # shorter ones, numbers and other scripts stay as they are
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of a QWERTY keyboard, each shifted by half a key
_TRIES = 8  # slips that change nothing, such as two equal letters swapped, are tried again


def noisy(row: Mapping[str, Any], settings: Noise) -> dict[str, Any] | None:
    """The noisy twin of a record, or None: for rows not chosen, and where no word of the user's can get a slip.

        user: What is a transpose?             user: Waht is a  transpose?
        assistant: The matrix mirrored.   ->   assistant: The matrix mirrored.     meta: {noise_of: <id>}

    The twin has the group of its original, whose id where it has none: both belong in one split. It depends on the
    row's id and content and on the settings alone; rows chosen at a smaller fraction are chosen at a larger one too.
    """
    if row["messages"] is None or _share("row", settings.seed, row["id"]) >= settings.fraction:
        return None
    random_of_row = random.Random(f"slips {settings.seed} {row['id']}")  # of text: the same on every machine
    asked = [number for number, turn in enumerate(row["messages"]) if turn["role"] == "user"]
    turns = [dict(turn) for turn in row["messages"]]
    for number in asked:
        turns[number]["content"] = _with_slips(turns[number]["content"], settings.rate, settings.kinds, random_of_row)
    if turns == row["messages"]:  # a short question, a low rate: one slip all the same
        for number in asked:
            turns[number]["content"] = _with_one_slip(turns[number]["content"], settings.kinds, random_of_row)
            if turns != row["messages"]:
                break
        else:
            return None
    return records.make(
        turns,
        group=row["group"] or row["id"],
        source=row["source"],
        task=row["task"],
        kind=row["kind"],
        tools=row["tools"],
        text=row["text"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        label=row["label"],
        split=row["split"],
        meta={**row["meta"], "noise_of": row["id"]},
    )


def _share(*parts: object) -> float:
    """A number in [0, 1) that belongs to these parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)


def _with_slips(text: str, rate: float, kinds: list[str], chance: random.Random) -> str:
    return _WORD.sub(lambda match: _slip(match[0], kinds, chance) if chance.random() < rate else match[0], text)


def _with_one_slip(text: str, kinds: list[str], chance: random.Random) -> str:
    """With a slip in one word, chosen by chance; as it is when it has no word."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = words[int(chance.random() * len(words))]
    return text[: word.start()] + _slip(word[0], kinds, chance) + text[word.end() :]


def _slip(word: str, kinds: list[str], chance: random.Random) -> str:
    """The word with one slip of one of the kinds. Only random() is used: its numbers are the same in every Python."""
    for _ in range(_TRIES):
        kind = kinds[int(chance.random() * len(kinds))]
        if (changed := SLIPS[kind](word, chance)) != word:
            return changed
    return word


def _typo(word: str, chance: random.Random) -> str:
    """A letter left out, doubled, swapped with the next one, or hit beside: form -> fom, foorm, fomr, fprm."""
    place, how = int(chance.random() * (len(word) - 1)), int(chance.random() * 4)
    before, letter, following, after = word[:place], word[place], word[place + 1], word[place + 2 :]
    if how == 0:
        return before + following + after
    if how == 1:
        return before + letter * 2 + following + after
    if how == 2:
        return before + following + letter + after
    near = NEIGHBOURS[letter.lower()]
    beside = near[int(chance.random() * len(near))]
    return before + (beside.upper() if letter.isupper() else beside) + following + after


def _case(word: str, chance: random.Random) -> str:
    """All small, all capital, or the first letter in the other case: Form -> form, FORM."""
    return (word.lower(), word.upper(), word[0].swapcase() + word[1:])[int(chance.random() * 3)]


def _spacing(word: str, chance: random.Random) -> str:
    """A blank inside, or one more before or behind: form -> fo rm, " form", "form "."""
    place = int(chance.random() * (len(word) + 1))
    return f"{word[:place]} {word[place:]}"


def _neighbours() -> dict[str, str]:
    """The keys that touch a letter's key: to its left and right, and in the rows above and below."""
    found = {}
    for number, row in enumerate(_ROWS):
        for place, letter in enumerate(row):
            above = _ROWS[number - 1][place : place + 2] if number else ""
            below = _ROWS[number + 1][max(0, place - 1) : place + 1] if number < 2 else ""
            found[letter] = row[max(0, place - 1) : place] + row[place + 1 : place + 2] + above + below
    return found


NEIGHBOURS = _neighbours()
SLIPS: dict[str, Callable[[str, random.Random], str]] = {"typo": _typo, "case": _case, "spacing": _spacing}
