"""Figures of how likely a model finds texts, from their negative log-likelihood."""

import math


def perplexity(nll: float, n_tokens: int) -> float:
    """exp of the mean nats per token: as uncertain as a choice among so many tokens. Models of one tokenizer only."""
    return math.exp(nll / n_tokens)


def bits_per_byte(nll: float, n_bytes: int) -> float:
    """Bits needed per byte of UTF-8 text; models of different tokenizers can be compared by it.

    loss / ln 2 * tokens / bytes, of a loss in nats per token: nll = loss * tokens.
    """
    return nll / math.log(2) / n_bytes
