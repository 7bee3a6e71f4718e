"""BLEU of one answer (Papineni et al., 2002), as sacrebleu computes it for a sentence, scaled to [0, 1].

Tokenizer 13a, letter case counts, exponential smoothing of orders without a match, and only the orders that the answer
is long enough for (effective order). The figure of a test split is the mean over rows, not sacrebleu's corpus score.
"""

from functools import cache

from sacrebleu.metrics import BLEU


def score(answer: str, reference: str) -> float:
    return min(1.0, float(_scorer().sentence_score(answer, [reference]).score) / 100)  # rounding may pass 100


@cache
def _scorer() -> BLEU:
    return BLEU(effective_order=True, smooth_method="exp", tokenize="13a")
