"""Matrix products of this machine at a model's own shapes: the limit in which both benchmarks of training count."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from stages.lib import numerics
from stages.lib.schema.numerics import Numerics


def gflop_per_second(base: Path, n: Numerics, tokens: int) -> float:
    """Of products in the compute type with each linear layer of the base, forward and backward, for one batch.

    Args: base: folder with config.json; no weight is read. tokens: in the batch.
    """
    import torch

    from stages.lib import estimate

    resolved = numerics.resolve(n)
    settings = {"dtype": getattr(torch, resolved.compute_dtype), "device": resolved.device}
    shapes = list(estimate.linear_layers(estimate.skeleton(base)).values())
    flop = seconds = 0.0
    for out_features, in_features in sorted(set(shapes)):
        sizes = ((out_features, in_features), (tokens, in_features), (tokens, out_features))
        weight, x, g = (torch.randn(size, **settings) for size in sizes)
        count = shapes.count((out_features, in_features))
        for product in (lambda x=x, weight=weight: x @ weight.t(), lambda g=g, weight=weight: g @ weight):
            seconds += count * seconds_of(product)
            flop += count * 2 * tokens * out_features * in_features
    return flop / seconds / 1e9


def seconds_of(product: Callable[[], object], *, rounds: int = 5, calls: int = 10) -> float:
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
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
