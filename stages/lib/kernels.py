"""How layers and attention compute in training: PEFT's and SDPA's functions, in less time."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.lib.unpacking import dequantized

DOCUMENTS = "documents"
"""Name under which transformers finds `document_attention`."""


class FusedLora(LoraLinear4bit):
    """PEFT's LoRA layer on a 4-bit layer, computed in one autograd step: y = x W^T + b + (alpha/r) z A^T B^T.

    z is x after dropout. Same parameters, same names, same function; two thirds of the time on a CPU, because the LoRA
    product is added inside the matrix product instead of by copies, and because nothing but z and z A^T is kept.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not x.dtype == a.dtype == b.dtype:
            return super().forward(x)
        return _LoraProduct.apply(x, self.lora_dropout[name](x), a, b, self.base_layer, self.scaling[name])


class _LoraProduct(torch.autograd.Function):
    """FusedLora's arithmetic. The 4-bit weight is unpacked once forward and once backward, and never kept unpacked."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        z: torch.Tensor,  # (..., in)
        a: torch.Tensor,  # (r, in)
        b: torch.Tensor,  # (out, r)
        layer: bnb.nn.Linear4bit,
        scaling: float,
    ) -> torch.Tensor:
        y = nn.functional.linear(_flat(x), dequantized(layer, x.dtype), layer.bias)  # (N, out)
        h = _flat(z) @ a.t()  # (N, r)
        y.addmm_(h, b.t(), alpha=scaling)
        ctx.save_for_backward(z, h, a, b)
        ctx.layer, ctx.scaling, ctx.is_dropped = layer, scaling, z is not x
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, h, a, b = ctx.saved_tensors
        g = _flat(gradients[0])  # (N, out)
        dh = (g @ b).mul_(ctx.scaling)  # (N, r)
        da = dh.t() @ _flat(z)
        db = (g.t() @ h).mul_(ctx.scaling)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = g @ dequantized(ctx.layer, g.dtype)  # (N, in)
            if ctx.is_dropped:
                dz = (dh @ a).view_as(z)
            else:
                dx.addmm_(dh, a)
            dx = dx.view_as(z)
        return dx, dz, da, db, None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed sequence, as if the others were not there.

    The cost is that of the documents, not the square of the sequence. Without document_lengths this is SDPA as usual.

    Args: query: (1, heads, T, D). key, value: (1, key/value heads, T, D). document_lengths: tokens of each, sum T.
    Returns: (1, T, heads, D).
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    outputs = []
    for q, k, v in zip(*(tensor.split(list(document_lengths), dim=2) for tensor in (query, key, value)), strict=True):
        window = _window(q.shape[2], sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, window, dropout_p=dropout, is_causal=window is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which key each query sees where a layer looks back no further than sliding_window; None where that is all."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


def _document_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask over the whole of a packed sequence; where a batch brings one, as in generation, SDPA's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(DOCUMENTS, document_attention)
AttentionMaskInterface.register(DOCUMENTS, _document_mask)
