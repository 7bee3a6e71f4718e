"""Accuracy: 1 when the predicted label is the right one, the same text to the letter; a classification only."""


def score(predicted: str, label: str) -> float:
    return float(predicted == label)
