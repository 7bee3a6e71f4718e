"""How close one model is to another on the same tokens: Kullback-Leibler divergence, top-1 agreement, perplexity.

The reference is computed once and kept, so that only one model at a time has to be in memory.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

LIKELY = 0.01  # probability from which a candidate of another runtime is compared


@dataclass(frozen=True)
class Reference:
    """What the reference model expects on held-out text.

    rows: token ids of the conversations. skipped: tokens that all of them begin with (the system turn), left out of
    every mean because they would only dilute it. log_probs: for each row (T_i - skipped, V), float32, on the CPU:
    memory is tokens x vocabulary x 4 bytes.
    """

    rows: Sequence[Sequence[int]]
    skipped: int
    log_probs: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Fidelity:
    """One model against the reference, over n predicted tokens. KL in nats per token, KL(reference || model)."""

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float  # share of positions where both models find the same token most likely
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity

    def metrics(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}/kl/mean": self.kl_mean,
            f"{prefix}/kl/p99": self.kl_p99,
            f"{prefix}/top1": self.top1,
            f"{prefix}/perplexity": self.perplexity,
            f"{prefix}/perplexity_ratio": self.perplexity_ratio,
        }


LogProbs = Callable[[Sequence[int], int], torch.Tensor]
"""A model as this module sees it: (row of T token ids, start) -> log-probabilities for row[start:], (T - start, V)."""


def of(model: PreTrainedModel) -> LogProbs:
    """A transformers model, seen so."""
    return partial(log_probs, model)


def reference(model: LogProbs, rows: Sequence[Sequence[int]]) -> Reference:
    """Next-token log-probabilities of the reference model on `rows`, two tokens or more each."""
    columns = zip(*(row[:-1] for row in rows), strict=False)
    shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), 1)
    skipped = max(1, shared)  # nothing predicts the first token
    return Reference(rows, skipped, [model(row, skipped) for row in rows])


@torch.inference_mode()
def log_probs(model: PreTrainedModel, row: Sequence[int], start: int) -> torch.Tensor:
    """Log-probabilities for the tokens row[start:], each given all before it: (T - start, V), float32, on the CPU.

    One row at a time: no padding, so that a row's numbers depend on nothing else.
    """
    ids = torch.tensor([list(row[:-1])], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(row) - start).logits[0]
    return logits.float().log_softmax(dim=-1).cpu()


def behind(model: PreTrainedModel, longer: Sequence[Sequence[int]]) -> LogProbs:
    """A model that reads each row at the end of a longer text: examples first, which are read once for all rows.

    Args: longer: for each row of the reference, in order, token ids that end as the row does.
    """
    waiting = iter(longer)
    read: dict[tuple[int, ...], Cache] = {}

    @torch.inference_mode()
    def found(row: Sequence[int], start: int) -> torch.Tensor:
        text = list(next(waiting))
        border = len(text) - (len(row) - start) - 1  # the token here predicts row[start]
        shown = tuple(text[:border])
        if shown and shown not in read:
            ids = torch.tensor([shown], device=model.device)
            read[shown] = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        ids = torch.tensor([text[border:-1]], device=model.device)
        before = copy.deepcopy(read[shown]) if shown else None  # a pass appends to what it is given
        logits = model(input_ids=ids, past_key_values=before, use_cache=True).logits[0]
        return logits.float().log_softmax(dim=-1).cpu()

    return found


def itself(expected: Reference) -> Fidelity:
    """The reference against itself: no divergence, its own perplexity."""
    kept = iter(expected.log_probs)
    return compare(expected, lambda row, start: next(kept))


def compare(expected: Reference, model: LogProbs) -> Fidelity:
    """Measure `model` on the reference's tokens."""
    kl, same, nll, reference_nll = [], [], [], []
    for row, reference_log_probs in zip(expected.rows, expected.log_probs, strict=True):
        found = model(row, expected.skipped)  # (T, V)
        if found.shape != reference_log_probs.shape:
            # A padded vocabulary: the extra entries stand for no token.
            found = found[:, : reference_log_probs.shape[1]].log_softmax(dim=-1)
        target = torch.tensor(list(row[expected.skipped :]))[:, None]
        kl.append((reference_log_probs.exp() * (reference_log_probs - found)).sum(dim=-1).double())
        same.append(found.argmax(dim=-1) == reference_log_probs.argmax(dim=-1))
        nll.append(-found.gather(1, target).double())
        reference_nll.append(-reference_log_probs.gather(1, target).double())
    per_token = torch.cat(kl).clamp(min=0)  # rounding can leave -1e-8 where both agree
    return Fidelity(
        tokens=per_token.numel(),
        kl_mean=per_token.mean().item(),
        kl_p99=per_token.quantile(0.99).item(),
        top1=torch.cat(same).double().mean().item(),
        perplexity=math.exp(torch.cat(nll).mean().item()),
        reference_perplexity=math.exp(torch.cat(reference_nll).mean().item()),
    )


def gaps(model_log_probs: torch.Tensor, top: Sequence[dict[int, float]]) -> list[float]:
    """Absolute differences between a model's log-probabilities and another runtime's most likely tokens, in nats.

    Candidates below LIKELY are left out: behind "-15 or -17 nats" stands no difference anyone could see.
    Args: model_log_probs: (T, V). top: for each of the T positions, token id -> log-probability in the other runtime.
    """
    return [
        abs(model_log_probs[position, token].item() - value)
        for position, candidates in enumerate(top)
        for token, value in candidates.items()
        if value >= math.log(LIKELY)
    ]
