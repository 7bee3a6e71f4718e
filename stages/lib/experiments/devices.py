"""Devices a training may be estimated for: memory, and what their matrix units reach.

Of GPUs the figures are those of data sheets: dense products (without sparsity) in bfloat16 with float32 sums.
"""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stages.lib import cost, estimate, numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.numerics import Numerics

GIB = estimate.GIB

USABLE = 0.93
"""Of a card's memory: the driver, and a screen, hold the rest."""

REACHED = 0.8
"""Of a data sheet's figure: what products reach. An assumption; what people report of torch's products in bfloat16 lies
between 0.79 (A100) and 0.97 (RTX 4090)."""


@dataclass(frozen=True)
class Device:
    """memory: bytes a training may take. limit: operations a second that bare matrix products reach."""

    name: str
    kind: str  # cpu or cuda
    memory: float
    limit: float
    has_bfloat16: bool
    source: str


def card(name: str, gib: int, tflops: float, source: str, *, has_bfloat16: bool = True) -> Device:
    """A GPU as its data sheet has it. gib: all its memory. tflops: of dense products."""
    return Device(name, "cuda", USABLE * gib * GIB, REACHED * tflops * 1e12, has_bfloat16, source)


ADA = "NVIDIA Ada whitepaper: twice the float32 rate"

CARDS = {
    found.name: found
    for found in (
        card("t4", 16, 8.1, "NVIDIA T4 data sheet: float32, as it has no bfloat16", has_bfloat16=False),
        card("rtx_4060", 8, 30.2, ADA),
        card("rtx_4070", 12, 58.3, ADA),
        card("rtx_4060_ti_16gb", 16, 44.1, ADA),
        card("rtx_3090", 24, 71.0, "NVIDIA Ampere GA102 whitepaper"),
        card("rtx_4090", 24, 165.2, ADA),
        card("rtx_5090", 32, 209.5, "NVIDIA RTX Blackwell whitepaper"),
        card("l4", 24, 121.0, "NVIDIA L4 data sheet, half of the figure with sparsity"),
        card("a10", 24, 125.0, "NVIDIA A10 data sheet"),
        card("l40s", 48, 362.0, "NVIDIA L40S data sheet"),
        card("a100_40gb", 40, 312.0, "NVIDIA A100 data sheet"),
        card("a100_80gb", 80, 312.0, "NVIDIA A100 data sheet"),
        card("h100_80gb", 80, 989.0, "NVIDIA H100 data sheet (SXM), half of the figure with sparsity"),
        card("h200", 140, 989.0, "NVIDIA H200 data sheet, half of the figure with sparsity"),
    )
}


HERE = "here"


def named(name: str) -> Device:
    """A card of the table.

    Raises: ConfigError, listing what there is.
    """
    if name not in CARDS:
        raise ConfigError(f"device: found {name}, expected {HERE} or one of {', '.join(CARDS)}.")
    return CARDS[name]


def here(model: PreTrainedModel, resolved: numerics.Resolved, tokens: int) -> Device:
    """This machine, or its GPU, whose products at a model's shapes are measured for about a second.

    Args: model: without weights. tokens: of a batch.
    """
    memory, what = estimate.machine_memory(resolved.device)
    limit = cost.limit_here(model, resolved, tokens)
    threads = f", {torch.get_num_threads()} threads" if resolved.device == "cpu" else ""
    has_bfloat16 = resolved.compute_dtype == "bfloat16"
    return Device(f"this machine ({what}{threads})", resolved.device, memory, limit, has_bfloat16, how_measured())


def how_measured() -> str:
    """Where this machine's figure comes from: where others compute here, it is what is left to us."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return "measured now" if load < cores / 2 else f"measured now, beside others: {load:.1f} processes on {cores} cores"


def resolve(n: Numerics, device: Device) -> numerics.Resolved:
    """What `auto` comes to on a card that need not be here."""
    return numerics.on(n, device.kind, has_bfloat16=device.has_bfloat16)
