"""Exact match: 1 when answer and reference are the same text, white space around them apart."""


def score(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())
