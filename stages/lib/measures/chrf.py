"""chrF2: F-score of character 1- to 6-grams, recall counting twice (Popovic, 2015), as sacrebleu computes it.

Per row and scaled to [0, 1]; the figure of a test split is the mean over rows, not sacrebleu's corpus score.
"""

from functools import cache

from sacrebleu.metrics import CHRF


def score(answer: str, reference: str) -> float:
    return float(_scorer().sentence_score(answer, [reference]).score) / 100


@cache
def _scorer() -> CHRF:
    return CHRF()
