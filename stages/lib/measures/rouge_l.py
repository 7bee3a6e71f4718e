"""ROUGE-L: F-measure of the longest common subsequence of words (Lin, 2004), as the rouge-score package computes it.

Words are runs of a-z and 0-9 in lower case, without stemming. A reference that has none, such as {} or text in another
script, is met by the same text alone; rouge-score would give 0 even to that.
"""

from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def score(answer: str, reference: str) -> float:
    if answer.strip() == reference.strip():
        return 1.0
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)
