"""4-bit weights as the values they stand for: layer by layer, for a while, or for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

KEPT_SHARE = 0.25
"""Of the memory that is available: how much the dense values of 4-bit weights may take to be kept for good."""


def values(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """What a layer multiplies with, (out, in), quantized or not."""
    return dequantized(layer, dtype) if isinstance(layer, bnb.nn.Linear4bit) else layer.weight


def dequantized(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    """The values a 4-bit layer multiplies with, (out, in), as its own forward unpacks them."""
    weight, kept = layer.__dict__.get("unpacked", (None, None))
    if weight is layer.weight and kept.dtype == dtype:
        return kept
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


def keep(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the values of all 4-bit layers at hand, if they take no more than KEPT_SHARE of the available memory.

    Kept or unpacked again at each use, they are the same to the bit.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    if sum(m.in_features * m.out_features for m in layers) * dtype.itemsize <= KEPT_SHARE * available_memory():
        for layer in layers:
            layer.__dict__["unpacked"] = layer.weight, dequantized(layer, dtype)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: of the machine's, and of its container's limit where there is one."""
    limits = [psutil.virtual_memory().available]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (cgroup / limit).is_file() and (text := (cgroup / limit).read_text().strip()) != "max":
            limits.append(int(text) - int((cgroup / used).read_text()))
    return max(0, min(limits))


@contextmanager
def unpacked(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the values of 4-bit layers at hand for many passes over few tokens, where unpacking would take most time.

    On CPU, and for layers that compute with `dequantized`; a GPU multiplies packed weights as fast.
    """
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and m.weight.device.type == "cpu"]
    layers = [layer for layer in layers if "unpacked" not in layer.__dict__]
    for layer in layers:
        layer.__dict__["unpacked"] = layer.weight, dequantized(layer, dtype)
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
