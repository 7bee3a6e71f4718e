"""How likely a model finds given answers: negative log-likelihood of the answer tokens after their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stages.lib import reading


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
    for read in reading.in_batches(model, prompts, room=room, batch_size=batch_size):
        found |= zip(read.rows, after(read, [answers[row] for row in read.rows]), strict=True)
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
def after(read: reading.Read, answers: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Score one answer per row of a batch of prompts that were read; the batch is left as it was.

    Answers are padded on the right: attention looks back only, so no answer token sees padding. Log-softmax is taken
    in float32 and summed on the CPU row by row.
    """
    width = max(len(answer) for answer in answers) - 1  # the last token of an answer predicts nothing scored
    logits = read.logits[:, None]  # (B, 1, V)
    if width:
        device = read.mask.device
        inputs = [[*answer[:-1], *[reading.PAD] * (width - len(answer) + 1)] for answer in answers]
        steps = torch.arange(width, device=device)
        output = read.model(
            input_ids=torch.tensor(inputs, device=device),
            attention_mask=torch.cat([read.mask, read.mask.new_ones(len(answers), width)], dim=1),
            position_ids=read.next_positions()[:, None] + steps,
            past_key_values=read.cache,
            use_cache=True,
        )
        read.forget(width)
        logits = torch.cat([logits, output.logits], dim=1)  # (B, 1 + width, V)
    found = []
    for answer, row_logits in zip(answers, logits, strict=True):
        target = torch.tensor(answer, device=row_logits.device)
        nll = torch.nn.functional.cross_entropy(row_logits[: len(answer)].float(), target, reduction="none")
        found.append(Likelihood(float(nll.double().sum().cpu()), len(answer)))
    return found
