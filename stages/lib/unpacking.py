"""4-bit weights as the values they stand for: layer by layer, for a while, or for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel


def dequantized(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    """The values a 4-bit layer multiplies with, (out, in), as its own forward unpacks them."""
    if (kept := layer.__dict__.get("unpacked")) is not None and kept.dtype == dtype:
        return cast(torch.Tensor, kept)
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, outer.absmax, outer.code, outer.blocksize, torch.float32
        )
        absmax = absmax + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        layer.weight.data.view(-1, 1), absmax, state.blocksize, state.quant_type, state.shape, dtype
    )


@contextmanager
def unpacked(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the values of 4-bit layers at hand for many passes over few tokens, where unpacking would take most time.

    On CPU, and for layers that compute with `dequantized`; a GPU multiplies packed weights as fast.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and m.weight.device.type == "cpu"]
    for layer in layers:
        layer.__dict__["unpacked"] = dequantized(layer, dtype)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["unpacked"]


def densify(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace each 4-bit layer by a Linear that holds its dequantized values."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(dequantized(layer, dtype), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
            model.set_submodule(name, plain.train(layer.training))
    # An ordinary model now: PEFT and save_pretrained look at these marks.
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model
