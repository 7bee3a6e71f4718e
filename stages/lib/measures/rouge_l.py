"""ROUGE-L: F-measure of the longest common subsequence of words (Lin, 2004), as the rouge-score package computes it.

Words are runs of a-z and 0-9 in lower case, without stemming; text in other scripts has none and scores 0.
"""

from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def score(answer: str, reference: str) -> float:
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)
