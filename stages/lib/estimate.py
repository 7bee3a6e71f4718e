"""Memory that a training will take, from the configuration and the base's config.json alone, before weights are read.

    held all the time   weights | adapter and its copies | optimizer | process
    at the peak         + gradients + activations + logits + workspace          (a training step)
                    or  + unpacked weights                                      (samples, on a CPU)

The constants are calibrated on CPU runs (docs/benchmarks.md); on a GPU they are what the arithmetic says, and the
interval is wider.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.lib import adapters, numerics, packing
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import Numerics, Quantization
from stages.lib.schema.train import Train

log = logging.getLogger(__name__)

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

BLOCK, OUTER_BLOCK = 64, 256
"""4-bit weights: one scale for 64 of them; with double quantization one byte, and a float32 for 256 of those."""

KEPT = {"cpu": (1.1, 1.5, 1.9), "cuda": (0.9, 1.3, 1.8)}
"""Activations kept for the backward pass, in inputs and outputs of the block's linear layers: these once, and the rest
for norms, attention and elementwise work."""

LOGITS = (1.0, 2.5, 3.0)
"""float32 values for each labelled token and word of the vocabulary: log-softmax, its gradient, and the logits."""

PROCESS = {"cpu": (0.4 * GIB, 0.6 * GIB, 1.0 * GIB), "cuda": (0.4 * GIB, 0.7 * GIB, 1.2 * GIB)}
"""Libraries and the tokenizer in memory; on a GPU the context, its kernels and what the allocator cannot use."""

COPIES = 3
"""Of what is trained: itself, as drawn, and the best so far."""


@dataclass(frozen=True)
class Range:
    """Bytes: surely, probably, and at the worst."""

    low: float
    expected: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __str__(self) -> str:
        return f"{self.expected / GIB:.2f} GiB ({self.low / GIB:.2f} to {self.high / GIB:.2f})"


ZERO = Range(0, 0, 0)


def exactly(size: float) -> Range:
    return Range(size, size, size)


def scaled(size: float, factors: tuple[float, float, float]) -> Range:
    return Range(*(size * factor for factor in factors))


@dataclass(frozen=True)
class Load:
    """One forward pass: its tokens, and those of them that have a label."""

    tokens: int
    labelled: int


@dataclass(frozen=True)
class Estimate:
    """Memory by part. held: all the time. step, sampling: on top of it, one at a time."""

    held: dict[str, Range]
    step: dict[str, Range]
    sampling: dict[str, Range]

    def parts(self) -> dict[str, Range]:
        """What stands in memory at the highest moment."""
        step, sampling = (sum(parts.values(), ZERO) for parts in (self.step, self.sampling))
        return self.held | (self.step if step.expected >= sampling.expected else self.sampling)

    def total(self) -> Range:
        return sum(self.parts().values(), ZERO)


def check(base: Path, lora: Lora, train: Train, n: Numerics, packs: Sequence[packing.Pack]) -> Estimate:
    """Refuse a training that this machine cannot hold, and an adapter on layers the base does not have.

    Reads config.json of the base, not its weights. Expected memory decides; where only the worst case is above what
    the machine has, one line says so.

    Raises: ConfigError, with every part's size and what the keys that lower it would give.
    """
    resolved = numerics.resolve(n)
    model = skeleton(base)
    found = memory(model, lora, train, n, resolved, heaviest(packs, train.batch_size))
    has, where = machine_memory(resolved.device)
    total = found.total()
    if total.expected > has:
        listed = "".join(f"\n  {name:<12} {size}" for name, size in found.parts().items())
        raise ConfigError(
            f"qlora_train: found an estimated {total} for this configuration, expected at most the {has / GIB:.2f} GiB "
            f"of {where}:{listed}\n{_advice(model, lora, train, n, resolved, packs)}"
        )
    if total.high > has:
        log.warning("memory: estimated %s, of %.2f GiB of %s; it may not be enough", total, has / GIB, where)
    return found


def _advice(
    model: PreTrainedModel,
    lora: Lora,
    train: Train,
    n: Numerics,
    resolved: numerics.Resolved,
    packs: Sequence[packing.Pack],
) -> str:
    """What each key that lowers memory would come to, by itself."""
    lines = []
    if train.batch_size > 1:
        lines.append(("train.batch_size=1", replace(train, batch_size=1), n))
    if not train.gradient_checkpointing:
        lines.append(("train.gradient_checkpointing=true", replace(train, gradient_checkpointing=True), n))
    if n.quantization is Quantization.none:
        lines.append(("numerics.quantization=nf4", train, replace(n, quantization=Quantization.nf4)))
    found = {
        change: memory(model, lora, t, numbers, resolved, heaviest(packs, t.batch_size)).total()
        for change, t, numbers in lines
    }
    changes = "; ".join(f"{change} gives {size.expected / GIB:.2f} GiB" for change, size in found.items())
    return f"Change {changes}; or lower pack.max_tokens, lora.r, or take a smaller base_model."


def skeleton(base: Path) -> PreTrainedModel:
    """The base without its weights: names and shapes of its tensors, on torch's meta device."""
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    return without_weights(config)


def without_weights(config: Any) -> PreTrainedModel:
    """The model of a transformers configuration on the meta device, its output embedding tied where the config says."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def heaviest(packs: Sequence[packing.Pack], batch_size: int) -> Load:
    """The largest batch that shuffling may draw."""
    tokens = sorted((len(pack.input_ids) for pack in packs), reverse=True)
    labelled = sorted((packing.trained_tokens(pack.labels) for pack in packs), reverse=True)
    return Load(sum(tokens[:batch_size]), sum(labelled[:batch_size]))


def memory(
    model: PreTrainedModel, lora: Lora, train: Train, n: Numerics, resolved: numerics.Resolved, load: Load
) -> Estimate:
    """Bytes of every part of a training on the resolved device.

    Args: model: without weights. load: of the largest forward pass.
    Raises: ConfigError, when lora.target_modules name layers that the base does not have.
    """
    layers = linear_layers(model)
    targets = adapters.resolve_targets(model, lora.target_modules)
    compute, adapter = BYTES[resolved.compute_dtype], BYTES[resolved.adapter_dtype]
    trained = trainable_parameters({name: layers[name] for name in targets}, lora)
    in_layers = sum(math.prod(shape) for shape in layers.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - in_layers
    per_weight = bytes_per_weight(n.quantization, is_double=n.double_quantization, compute=compute)
    is_unpacked = resolved.device == "cpu" and n.quantization is not Quantization.none
    largest = max(math.prod(shape) for shape in layers.values())
    n_blocks = model.config.get_text_config().num_hidden_layers

    size = sum(sum(shape) for shape in layers.values()) * load.tokens * compute  # in and out of every linear layer
    activations = scaled(size, KEPT[resolved.device])
    dropped = sum(layers[name][1] for name in targets) * load.tokens * (compute + 1) if lora.dropout else 0
    ranks = len(targets) * lora.r * load.tokens * adapter
    in_flight = scaled(size / n_blocks, (0.5, 1.0, 1.5))  # of one block, while its gradients are computed
    if train.gradient_checkpointing:
        inputs = n_blocks * model.config.get_text_config().hidden_size * load.tokens * compute
        activations = exactly(inputs) + scaled((size + dropped + ranks) / n_blocks, KEPT[resolved.device])
    else:
        activations += exactly(dropped + ranks)
    vocabulary = load.labelled * model.config.get_text_config().vocab_size * BYTES["float32"]
    return Estimate(
        held={
            "weights": exactly(in_layers * per_weight + others * compute),
            "adapter": exactly(COPIES * trained * adapter),
            "optimizer": exactly(2 * trained * adapter),
            "process": Range(*PROCESS[resolved.device]),
        },
        step={
            "gradients": exactly(trained * adapter),
            "activations": activations,
            "logits": scaled(vocabulary, LOGITS),
            "workspace": in_flight + exactly(largest * compute),
        },
        sampling={"unpacked": exactly(in_layers * compute if is_unpacked and train.samples else 0)},
    )


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the output embedding: what is quantized, and what an adapter sits on."""
    modules: Mapping[str, Any] = dict(model.named_modules())
    return {name: (modules[name].out_features, modules[name].in_features) for name in adapters.linear_layers(model)}


def trainable_parameters(targets: Mapping[str, tuple[int, int]], lora: Lora) -> int:
    """How many numbers are trained.

    lora    r (in + out) for each target; A is (r, in), B is (out, r)
    """
    return sum(lora.r * sum(shape) for shape in targets.values())


def bytes_per_weight(quantization: Quantization, *, is_double: bool, compute: int) -> float:
    """Of a linear layer, its scales included.

    nf4     0.5 + 4/64 = 0.5625; double quantization: 0.5 + 1/64 + 4/(64 x 256) = 0.5159
    """
    if quantization is Quantization.none:
        return compute
    scales = 1 / BLOCK + 4 / (BLOCK * OUTER_BLOCK) if is_double else 4 / BLOCK
    return 0.5 + scales


def machine_memory(device: str) -> tuple[int, str]:
    """Bytes there are in all, and of what: the GPU, or the cgroup's limit where that is below physical memory."""
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        return card.total_memory, card.name
    limits = {"physical memory": psutil.virtual_memory().total} | cgroup_limits()
    where = min(limits, key=lambda name: limits[name])
    return limits[where], where


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> dict[str, int]:
    """Memory limits of the control groups this process is in: version 2 (memory.max on the way up), or version 1."""
    lines = own.read_text().splitlines() if own.exists() else []
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break
            limit = place / name
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                found[f"the control group's limit ({limit})"] = int(text)
    return found
