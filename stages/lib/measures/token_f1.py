"""Token F1: words that answer and reference share, by SQuAD's normalisation (Rajpurkar et al., 2016, section 4.2)."""

import re
import string
from collections import Counter


def score(answer: str, reference: str) -> float:
    """F1 over the words of both, each counted as often as it stands; order does not matter.

    Lower case, without punctuation and the articles a, an, the. Where either side has no word left, 1 when both have
    none and are the same text, else 0: SQuAD gives two texts of mere punctuation 1, which would reward "." for "?".
    """
    found, expected = words(answer), words(reference)
    if not found or not expected:
        return float(answer.strip() == reference.strip())
    right = (Counter(found) & Counter(expected)).total()
    return 2 * right / (len(found) + len(expected))


def words(text: str) -> list[str]:
    """The words that are compared: SQuAD's normalize_answer, split at white space."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
