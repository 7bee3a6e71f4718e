"""Activations whose last bits do not depend on the number of threads that share the work.

Torch cuts an elementwise operation into one range a thread, wherever that falls, and computes what does not fill a
vector at the end of a range by scalar code, whose exp and tanh round otherwise:

    2 threads   [v v v v v v v s s][v v v v v v v s s]      v: by vectors, s: by scalar code
    here        [v v v v v v v v][v v v v v v v v]  [s s]   the same elements as on one thread

Of what a decoder computes only its activations differ so: exp, cos, sin and tanh alone, norms, softmax, reductions
along a dimension, products and AdamW do not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

VECTORS = 64
"""Elements that fill whole vectors whatever the type: two of AVX512, of 16-bit values."""

aten = torch.ops.aten


def steady(model: nn.Module) -> None:
    """Let the activations of a model on a CPU give the same bytes on any number of threads, in place."""
    for module in model.modules():
        if type(module) in GRADIENTS:
            module.forward = functools.partial(_Steady.apply, *GRADIENTS[type(module)])  # type: ignore[method-assign]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return _cut(_ranges, lambda y, x: aten.silu.out(x, out=y), x)


def silu_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to x, where g is the one with respect to silu(x)."""
    return _cut(_ranges, lambda y, g, x: aten.silu_backward.grad_input(g, x, grad_input=y), g, x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return _cut(_ranges_of_gelu, lambda y, x: aten.gelu.out(x, approximate="tanh", out=y), x)


def gelu_tanh_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to x, where g is the one with respect to gelu_tanh(x)."""
    kernel = functools.partial(aten.gelu_backward.grad_input, approximate="tanh")
    return _cut(_ranges, lambda y, g, x: kernel(g, x, grad_input=y), g, x)


def _cut(ranges: Callable[[int], int], kernel: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Compute a leading part, which torch cuts into ranges of whole vectors, and the short rest by itself."""
    flat = [tensor.contiguous().view(-1) for tensor in inputs]
    y = torch.empty_like(flat[0])
    for part in _parts(y.numel(), ranges):
        kernel(y[part], *(tensor[part] for tensor in flat))
    return y.view(inputs[0].shape)


def _parts(n: int, ranges: Callable[[int], int]) -> list[slice]:
    for count in range(ranges(n), 1, -1):
        end = n - n % (VECTORS * count)
        if ranges(end) == count:
            return [slice(end), slice(end, n)] if end < n else [slice(n)]
    return [slice(n)]


def _ranges(n: int) -> int:
    """Into how many torch cuts n elements: a thread gets at least 32,768 (at::internal::GRAIN_SIZE)."""
    return min(torch.get_num_threads(), -(-n // 32768))


def _ranges_of_gelu(n: int) -> int:
    """Forward; from 16,384 elements on all threads work (GELU_MIN_ELEMENTS_FOR_MULTI_THREADING)."""
    return torch.get_num_threads() if n > 16384 else 1


class _Steady(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, gradient: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.gradient(gradients[0], *ctx.saved_tensors)


GRADIENTS: dict[type[nn.Module], tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    nn.SiLU: (silu, silu_backward),
    SiLUActivation: (silu, silu_backward),
    GELUTanh: (gelu_tanh, gelu_tanh_backward),
}
