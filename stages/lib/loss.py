"""The loss of packed sequences: negative log-likelihood where there are labels."""

from collections.abc import Sequence
from typing import Any

import torch

from stages.lib import adapters
from stages.lib.chat import IGNORED


def end_to_end(packs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Lay packs one after the other: input_ids, labels and position_ids, each (1, sum of T_i)."""
    columns = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[value for pack in packs for value in pack[name]]]) for name in columns}


def answer_nll(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood of the labelled tokens, summed, in nats, and their number.

    Only the hidden states that predict a labelled token go through the head: with a vocabulary of 49,152 and answers
    of a fifth of the tokens it would be a quarter of all work.
    """
    if adapters.is_virtual(model):
        return _document_by_document(model, inputs)
    labels = inputs["labels"][0]  # (T,)
    predicting = (labels[1:] != IGNORED).nonzero()[:, 0]  # (A,)
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)]
    output = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        logits_to_keep=predicting,
        document_lengths=lengths,
        use_cache=False,
    )
    # (1, A, V) is only viewed as (A, V): indexing would cost the backward pass a copy of all of it
    return cross_entropy(output.logits.flatten(0, 1).float(), labels[predicting + 1]), len(predicting)


def _document_by_document(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """answer_nll where virtual tokens stand before each document: these have no packed form."""
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    nll, n_labels = inputs["input_ids"].new_zeros((), dtype=torch.float32), 0
    for start, end in zip(starts, [*starts[1:], inputs["labels"].shape[1]], strict=True):
        labels = inputs["labels"][0, start:end]
        predicting = (labels[1:] != IGNORED).nonzero()[:, 0]  # (A,)
        if len(predicting):
            # From the end, for prompt tuning puts its tokens before the others in the output, too.
            output = model(
                input_ids=inputs["input_ids"][:, start:end], logits_to_keep=predicting - len(labels), use_cache=False
            )
            logits = output.logits[0].float()
            nll = nll + cross_entropy(logits, labels[predicting + 1])
            n_labels += len(predicting)
    return nll, n_labels


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -log softmax(logits)[label]. The logits are spent: their place holds what the gradient needs.

    Args: logits: (A, V) float32. labels: (A,).
    """
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        at_label = logits.gather(1, labels[:, None])  # (A, 1)
        highest = logits.amax(1, keepdim=True)
        powers = logits.detach().sub_(highest).exp_()  # (A, V)
        sums = powers.sum(1, keepdim=True)
        ctx.save_for_backward(powers, labels, sums)
        return (sums.log() + highest - at_label).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        powers, labels, sums = ctx.saved_tensors
        (g,) = gradients
        powers.mul_(g / sums)
        powers[torch.arange(len(labels), device=labels.device), labels] -= g
        return powers, None
