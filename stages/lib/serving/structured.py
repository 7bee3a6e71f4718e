"""Answers that are JSON of a given schema: the model chooses among the tokens that lead there (llguidance)."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from stages.lib.serving.refusals import Refusal

WHITESPACE = r"\n?[ \t]{0,16}"
"""Between the parts of JSON. Without a bound a small model may write blanks until its tokens are spent."""


class Guide(Protocol):
    """What may come next in one answer."""

    def allowed(self) -> torch.Tensor:
        """(V,) as bool."""

    def take(self, token: int) -> None:
        """The token was written."""

    def is_done(self) -> bool:
        """Nothing but the end can follow."""


class _Guide:
    def __init__(self, matcher: Any, n_tokens: int) -> None:
        self._matcher, self._n = matcher, n_tokens

    def allowed(self) -> torch.Tensor:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(self._n, dtype=torch.bool)
        known = torch.from_numpy(bits[: self._n].astype(bool))
        allowed[: len(known)] = known
        return allowed

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def is_done(self) -> bool:
        return bool(self._matcher.is_stopped())


def guides(
    tokenizer: PreTrainedTokenizerFast, n_tokens: int, stop_ids: Sequence[int]
) -> Callable[[dict[str, Any]], Guide]:
    """What makes a guide of a JSON schema. It raises Refusal, for a schema that cannot be followed, or when the extra
    `serve` of pyproject.toml is not installed.

    Args: n_tokens: V, as the model has it.
    """
    if importlib.util.find_spec("llguidance") is None:
        return _absent
    import llguidance.hf

    known = llguidance.hf.from_tokenizer(tokenizer, eos_token=list(stop_ids))

    def make(schema: dict[str, Any]) -> Guide:
        overrides = {"whitespace_pattern": WHITESPACE}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)
            matcher = llguidance.LLMatcher(known, grammar)
        except ValueError as fault:
            raise Refusal(400, f"response_format: {fault}", param="response_format") from None
        if matcher.is_error():
            raise Refusal(400, f"response_format: {matcher.get_error()}", param="response_format")
        return _Guide(matcher, n_tokens)

    return make


def _absent(schema: dict[str, Any]) -> Guide:
    raise Refusal(
        400,
        "response_format: needs llguidance, which is not installed (the extra `serve` of pyproject.toml). "
        "The server of a GGUF file has it: make serve.",
        param="response_format",
    )
