"""How layers, norms and attention compute in training: PEFT's, transformers' and SDPA's functions, in less time.

Everything here computes in float32 on a CPU what the code it stands in for computes, and hands anything else, another
dtype, method or layer, to that code.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from stages.lib import activations, unpacking

DOCUMENTS = "documents"
"""Name under which transformers finds `document_attention`."""


def quicken(model: PeftModel) -> None:
    """Let the model compute in less time what it computes anyway, on a CPU: in place, every name kept.

    A norm, MLP or attention whose code is Llama's to the letter, as in many decoders (attention also: Mistral's or
    Qwen2's), is computed by this module's; others are left as they are. Dense values of 4-bit weights are kept where
    memory has room (`unpacking.keep`).
    """
    if model.device.type != "cpu":
        return
    for module in model.modules():
        for quick in (QuickNorm, QuickMlp, QuickAttention):
            if any(_is_same_code(type(module), original) for original in quick.stands_in_for):
                # As torch's parametrizations do: this instance alone computes otherwise, and stays what it is.
                module.__class__ = type(f"Quick{type(module).__name__}", (quick, type(module)), {})
    unpacking.keep(model, torch.float32)


def _is_same_code(found: type[nn.Module], original: type[nn.Module]) -> bool:
    """Whether two classes compute by the same code, rotary embedding included."""
    rotate = getattr(found.forward, "__globals__", {}).get("apply_rotary_pos_emb", apply_rotary_pos_emb)
    return (
        _code(found.forward) == _code(original.forward)
        and _code(rotate) == _code(apply_rotary_pos_emb)
        and _code(rotate.__globals__["rotate_half"]) == _code(apply_rotary_pos_emb.__globals__["rotate_half"])
    )


def _code(function: Any) -> tuple[Any, ...]:
    code = getattr(function, "__code__", None)
    return (code.co_code, code.co_consts, code.co_names, code.co_varnames) if code else (function,)


class _Fused:
    """A LoRA layer of PEFT computed in one autograd step: y = x W^T + b + (alpha/r) z A^T B^T.

    z is x after dropout. Same parameters, same names, same function; two thirds of the time on a CPU, because the LoRA
    product is added inside the matrix product instead of by copies, and because nothing but z and z A^T is kept.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not _is_plain(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        (name,) = self.active_adapters
        return _products(x, self.lora_dropout[name](x), [self])[0]


class FusedLora(_Fused, LoraLinear4bit):
    """On a 4-bit layer."""


class FusedLinear(_Fused, LoraLinear):
    """On an ordinary one."""


def _is_plain(layer: Any, x: torch.Tensor) -> bool:
    """Whether a layer computes LoRA as published, with one adapter, in x's dtype, its own weights frozen."""
    if not isinstance(layer, FusedLora | FusedLinear) or layer.disable_adapters or layer.merged or layer.lora_variant:
        return False
    (name, *others), base = layer.active_adapters, layer.base_layer
    if others or layer.lora_bias[name] or base.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype == layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype


def products(x: torch.Tensor, layers: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """What several layers make of one input, in one autograd step where they are `_Fused` and drop nothing."""
    if all(_is_plain(layer, x) and not _is_dropping(layer) for layer in layers):
        return _products(x, x, layers)
    return tuple(layer(x) for layer in layers)


def _is_dropping(layer: Any) -> bool:
    return layer.training and any(isinstance(dropout, nn.Dropout) for dropout in layer.lora_dropout.values())


def _products(x: torch.Tensor, z: torch.Tensor, layers: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    adapters = [(layer, layer.active_adapters[0]) for layer in layers]
    matrices = [m for layer, name in adapters for m in (layer.lora_A[name].weight, layer.lora_B[name].weight)]
    scalings = [layer.scaling[name] for layer, name in adapters]
    return _LoraProducts.apply(x, z, [layer.base_layer for layer in layers], scalings, *matrices)


class _LoraProducts(torch.autograd.Function):
    """The arithmetic of `_Fused`, for layers with one input: their A are multiplied with it together.

    A 4-bit weight that is not kept unpacked is unpacked once forward and once backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        z: torch.Tensor,  # (..., in)
        layers: Sequence[nn.Linear],
        scalings: Sequence[float],
        *matrices: torch.Tensor,  # of each layer A (r, in) and B (out, r)
    ) -> tuple[torch.Tensor, ...]:
        a, b = torch.cat(matrices[::2]), matrices[1::2]
        h = _flat(z) @ a.t()  # (N, sum of r)
        outputs = []
        for layer, b_i, h_i, scaling in zip(layers, b, _by_layer(h, b), scalings, strict=True):
            y = functional.linear(_flat(x), unpacking.values(layer, x.dtype), layer.bias)  # (N, out)
            outputs.append(y.addmm_(h_i, b_i.t(), alpha=scaling).view(*x.shape[:-1], -1))
        ctx.save_for_backward(z, h, a, *b)
        ctx.layers, ctx.scalings, ctx.is_dropped = layers, scalings, z is not x
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, h, a, *b = ctx.saved_tensors
        gs = [_flat(gradient) for gradient in gradients]  # (N, out)
        dh = torch.empty_like(h)
        dbs = []
        for g, b_i, h_i, dh_i, scaling in zip(gs, b, _by_layer(h, b), _by_layer(dh, b), ctx.scalings, strict=True):
            torch.mm(g, b_i, out=dh_i)
            db = h_i.t() @ g  # twice as fast as its transpose
            if scaling != 1:
                dh_i.mul_(scaling)
                db.mul_(scaling)
            dbs.append(db.t())
        das = (dh.t() @ _flat(z)).split([b_i.shape[1] for b_i in b])
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = gs[0] @ unpacking.values(ctx.layers[0], gs[0].dtype)  # (N, in)
            for g, layer in zip(gs[1:], ctx.layers[1:], strict=True):
                dx.addmm_(g, unpacking.values(layer, g.dtype))
            if ctx.is_dropped:
                dz = (dh @ a).view_as(z)
            else:
                dx.addmm_(dh, a)
            dx = dx.view_as(z)
        return dx, dz, None, None, *(d for pair in zip(das, dbs, strict=True) for d in pair)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _by_layer(h: torch.Tensor, b: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return h.split([b_i.shape[1] for b_i in b], dim=1)


class QuickNorm(nn.Module):
    """Llama's norm, w x / sqrt(mean(x^2) + epsilon), with a frozen w."""

    stands_in_for = (LlamaRMSNorm,)

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32 or self.weight.requires_grad:
            return super().forward(hidden_states)
        return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norms.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dx = gradients[0] * weight
        along = (dx * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return dx.mul_(scale).addcmul_(x, along), None, None


class QuickMlp(nn.Module):
    """Llama's MLP, down(silu(gate(x)) * up(x)), with gate and up in one step and two tensors kept of it."""

    stands_in_for = (LlamaMLP,)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.act_fn, nn.SiLU | SiLUActivation):
            return super().forward(x)
        return self.down_proj(_GatedSilu.apply(*products(x, (self.gate_proj, self.up_proj))))


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return activations.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        (g,) = gradients
        return activations.silu_backward(g * up, gate), activations.silu(gate).mul_(g)


class QuickAttention(nn.Module):
    """Llama's attention over packed documents: q, k and v in one step, turned and attended to in another."""

    stands_in_for = (LlamaAttention, MistralAttention, Qwen2Attention)

    def forward(
        self: Any,
        hidden_states: torch.Tensor,  # (1, T, hidden)
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,  # cos and sin, (1, T, D) each
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        lengths, dropout = kwargs.get("document_lengths"), self.attention_dropout if self.training else 0.0
        if (
            position_embeddings is None
            or past_key_values is not None
            or lengths is None
            or self.config._attn_implementation != DOCUMENTS
            or not _is_flash(hidden_states, lengths, dropout, _sliding_window(self))
        ):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        found = products(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.view(y.shape[1], -1, self.head_dim) for y in found)
        cos, sin = (table.squeeze(0).unsqueeze(1) for table in position_embeddings)
        return self.o_proj(_DocumentAttention.apply(q, k, v, cos, sin, lengths, self.scaling).flatten(1)[None]), None


def _sliding_window(attention: Any) -> int | None:
    """How far back a layer of those above may look."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def _is_flash(x: torch.Tensor, lengths: Sequence[int], dropout: float, window: int | None) -> bool:
    """Whether SDPA would attend inside each document by its flash kernel for CPUs."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not dropout
        and (window is None or max(lengths) <= window)
    )


class _DocumentAttention(torch.autograd.Function):
    """Rotary embedding, and causal attention inside each document by SDPA's kernel for CPUs, few copies around it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # (T, heads, D)
        k: torch.Tensor,  # (T, key/value heads, D)
        v: torch.Tensor,  # (T, key/value heads, D)
        cos: torch.Tensor | None,  # (T, 1, D); None where q and k are turned already
        sin: torch.Tensor | None,
        lengths: Sequence[int],
        scaling: float | None,
    ) -> torch.Tensor:  # (T, heads, D)
        if cos is not None and sin is not None:
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        norms = []
        for of_out, *qkv in zip(*(_documents(tensor, lengths) for tensor in (out, q, k, v)), strict=True):
            found, norm = _flash(*qkv, 0.0, True, scale=scaling)
            of_out.copy_(found)
            norms.append(norm)
        ctx.save_for_backward(q, k, v, cos, sin, out, *norms)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, cos, sin, out, *norms = ctx.saved_tensors
        d = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
        tensors = (*d, gradients[0], q, k, v, out)
        for norm, *parts in zip(norms, *(_documents(tensor, ctx.lengths) for tensor in tensors), strict=True):
            for of_d, found in zip(
                parts[:3], _flash_backward(*parts[3:], norm, 0.0, True, scale=ctx.scaling), strict=True
            ):
                of_d.copy_(found)
        if cos is not None:
            back = -sin.roll(sin.shape[-1] // 2, -1)
            d[:2] = (_turned(tensor, cos, back) for tensor in d[:2])
        return *d, None, None, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _documents(x: torch.Tensor, lengths: Sequence[int]) -> Iterable[torch.Tensor]:
    """Views of each document's part of (T, heads, D), as SDPA takes them: (1, heads, T_i, D)."""
    return (part.transpose(0, 1)[None] for part in x.split(list(lengths)))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


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
    Raises: ValueError, for a layer that caps its scores or adds to them, which SDPA cannot.
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if unknown := [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(f"attention inside documents by SDPA knows no {unknown} of {type(module).__name__}")
    if _is_flash(query, document_lengths, dropout, sliding_window):
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return _DocumentAttention.apply(q, k, v, None, None, document_lengths, scaling)[None], None
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
