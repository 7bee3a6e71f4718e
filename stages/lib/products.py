"""Matrix products of this machine at a model's own shapes: the limit that benchmarks and estimates count in."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from stages.lib import estimate, numerics


def gflop_per_second(
    model: PreTrainedModel, resolved: numerics.Resolved, tokens: int, *, rounds: int = 5, calls: int = 10
) -> float:
    """Of products in the compute type with each linear layer of a model, forward and backward, for one batch.

    Args: model: without weights. tokens: in the batch. rounds, calls: each product is timed so often.
    """
    settings = {"dtype": getattr(torch, resolved.compute_dtype), "device": resolved.device}
    shapes = list(estimate.linear_layers(model).values())
    flop = seconds = 0.0
    for out_features, in_features in sorted(set(shapes)):
        sizes = ((out_features, in_features), (tokens, in_features), (tokens, out_features))
        weight, x, g = (torch.rand(size, **settings) for size in sizes)
        count = shapes.count((out_features, in_features))
        for product in (lambda x=x, weight=weight: x @ weight.t(), lambda g=g, weight=weight: g @ weight):
            seconds += count * seconds_of(product, rounds=rounds, calls=calls)
            flop += count * 2 * tokens * out_features * in_features
    return flop / seconds / 1e9


def seconds_of(product: Callable[[], object], *, rounds: int, calls: int) -> float:
    """Of one call: the median of several rounds, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            product()
        synchronize()
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found[1:])


def synchronize() -> None:
    """Wait until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
