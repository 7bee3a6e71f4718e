"""How likely a model finds given answers: negative log-likelihood of the answer tokens after their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stages.lib import prefill


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of one answer in nats, summed over its n_tokens tokens, end-of-turn included."""

    nll: float
    n_tokens: int


def answer_likelihoods(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, batch_size: int
) -> list[Likelihood]:
    """Score each answer after its prompt, in the order of the rows.

    Args: prompts: T_i token ids each, at least one. answers: A_i token ids each, at least one.
    """
    found: dict[int, Likelihood] = {}
    room = max((len(answer) for answer in answers), default=0)
    for read in prefill.in_batches(model, prompts, room=room, batch_size=batch_size):
        found |= zip(read.rows, after(read, [answers[row] for row in read.rows]), strict=True)
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
def after(read: prefill.Read, answers: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Score one answer per line of a batch of prompts that were read; the batch stays ready to be continued.

    Answers are padded on the right: attention looks back only, so no answer token sees padding. Log-softmax is taken
    in float32 and summed on the CPU row by row.
    """
    found = []
    for lines in read.passes():
        written = answers[lines]
        logits = read.logits[lines, None]  # (b, 1, V), for the first token of each answer
        width = max(len(answer) for answer in written) - 1  # the last token of an answer predicts nothing scored
        if width:
            device = read.mask.device
            inputs = [[*answer[:-1], *[prefill.PAD] * (width - len(answer) + 1)] for answer in written]
            mask = torch.cat([read.mask[lines], read.mask.new_ones(len(written), width)], dim=1)
            spots = read.next_positions()[lines, None] + torch.arange(width, device=device)
            rest = read.forward(lines, torch.tensor(inputs, device=device), mask, spots, keep=width)
            logits = torch.cat([logits, rest], dim=1)  # (b, 1 + width, V)
        found += [_likelihood(answer, line_logits) for answer, line_logits in zip(written, logits, strict=True)]
    return found


def _likelihood(answer: Sequence[int], logits: torch.Tensor) -> Likelihood:
    """logits: (at least A, V), row t for answer[t]."""
    target = torch.tensor(answer, device=logits.device)
    nll = torch.nn.functional.cross_entropy(logits[: len(answer)].float(), target, reduction="none")
    return Likelihood(float(nll.double().sum().cpu()), len(answer))
