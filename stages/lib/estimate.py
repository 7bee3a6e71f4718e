"""Memory that a training will take, from the configuration and the base's config.json alone, before weights are read.

    held all the time   weights (and unpacked ones) | adapter and its copies | optimizer | process
    at the peak         + gradients + activations + logits + workspace       (a training step)
                    or  + unpacked weights                                   (samples, on a CPU that has not kept them)

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
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.lib import adapters, numerics, packing, unpacking
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import FROM_WEIGHTS, VIRTUAL, Lora, Method, check_together
from stages.lib.schema.numerics import Numerics, Quantization
from stages.lib.schema.train import Optimizer, Train, check_optimizer

log = logging.getLogger(__name__)

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

BLOCK, OUTER_BLOCK = 64, 256
"""4-bit weights: one scale for 64 of them; with double quantization one byte, and a float32 for 256 of those."""

KEPT = {"cpu": (0.9, 1.2, 1.6), "cuda": (0.9, 1.3, 1.8)}
"""Activations kept for the backward pass, in inputs and outputs of the block's linear layers: these once, and the rest
for norms, attention and elementwise work."""

IN_FLIGHT = {"cpu": (1.0, 4.0, 8.0), "cuda": (0.5, 1.0, 1.5)}
"""Inputs and outputs of one block, so many times, while its gradients are made; a CPU's allocator gives back late."""

LOGITS = (1.0, 2.5, 3.0)
"""float32 values for each labelled token and word of the vocabulary: log-softmax, its gradient, and the logits."""

PROCESS = {"cpu": (0.45 * GIB, 0.55 * GIB, 1.0 * GIB), "cuda": (0.4 * GIB, 0.7 * GIB, 1.2 * GIB)}
"""Libraries and the tokenizer in memory; on a GPU the context, its kernels and what the allocator cannot use."""

PACKED = (Quantization.nf4, Quantization.fp4)

COPIES = 3
"""Of what is trained: itself, as drawn, and the best so far."""


@dataclass(frozen=True)
class Range:
    """Bytes, or seconds: at the best, probably, and at the worst."""

    low: float
    expected: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)


ZERO = Range(0, 0, 0)


def in_gib(size: Range) -> str:
    return f"{size.expected / GIB:.2f} GiB ({size.low / GIB:.2f} to {size.high / GIB:.2f})"


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

    def of_tensors(self) -> Range:
        """Without the process: what torch counts on a GPU."""
        return sum((size for name, size in self.parts().items() if name != "process"), ZERO)


def check(model: PreTrainedModel, lora: Lora, train: Train, n: Numerics, packs: Sequence[packing.Pack]) -> Estimate:
    """Refuse a training that this machine cannot hold, and an adapter on layers the base does not have.

    Expected memory decides; where only the worst case is above what the machine has, one line says so.

    Args: model: without weights.

    Raises: ConfigError, with every part's size and what the keys that lower it would give; or naming the keys of
    several sections that do not go together.
    """
    check_together(lora, n, gradient_checkpointing=train.gradient_checkpointing)
    resolved = numerics.resolve(n)
    check_optimizer(train, resolved.device)
    room = unpacking.KEPT_SHARE * unpacking.available_memory()
    found = memory(model, lora, train, n, resolved, heaviest(packs, train.batch_size), room=room)
    has, where = machine_memory(resolved.device)
    total = found.total()
    if total.expected > has:
        listed = "".join(f"\n  {name:<12} {in_gib(size)}" for name, size in found.parts().items() if size.high)
        raise ConfigError(
            f"memory: found an estimated {in_gib(total)} for this configuration, expected at most the "
            f"{has / GIB:.2f} GiB of {where}:{listed}\n{_advice(model, lora, train, n, resolved, packs, room)}"
        )
    if total.high > has:
        log.warning("memory: estimated %s, of %.2f GiB of %s; it may not be enough", in_gib(total), has / GIB, where)
    return found


def _advice(
    model: PreTrainedModel,
    lora: Lora,
    train: Train,
    n: Numerics,
    resolved: numerics.Resolved,
    packs: Sequence[packing.Pack],
    room: float,
) -> str:
    """What each key that lowers memory would come to, by itself."""
    lines = []
    if train.batch_size > 1:
        lines.append(("train.batch_size=1", replace(train, batch_size=1), n))
    if not train.gradient_checkpointing:
        lines.append(("train.gradient_checkpointing=true", replace(train, gradient_checkpointing=True), n))
    if n.quantization is Quantization.none and lora.method is not Method.full:
        lines.append(("numerics.quantization=nf4", train, replace(n, quantization=Quantization.nf4)))
    found = {
        change: memory(model, lora, t, numbers, resolved, heaviest(packs, t.batch_size), room=room).total()
        for change, t, numbers in lines
    }
    changes = [f"{change} gives {size.expected / GIB:.2f} GiB" for change, size in found.items()]
    return "; ".join([*changes, "lower pack.max_tokens or lora.r", "or take a smaller base_model."])


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
    model: PreTrainedModel,
    lora: Lora,
    train: Train,
    n: Numerics,
    resolved: numerics.Resolved,
    load: Load,
    *,
    room: float = math.inf,
) -> Estimate:
    """Bytes of every part of a training on the resolved device.

    Args: model: without weights. load: of the largest forward pass. room: for the dense values of 4-bit weights, which
        a CPU keeps at hand where they fit into it, and otherwise unpacks layer by layer.
    Raises: ConfigError, when lora.* names layers or modules that the base does not have.
    """
    shape = model.config.get_text_config()
    layers = linear_layers(model)
    targets = {name: layers[name] for name in targets_of(model, lora)}
    compute, adapter = BYTES[resolved.compute_dtype], BYTES[resolved.adapter_dtype]
    trained = trainable_parameters(model, lora)
    in_layers = sum(math.prod(size) for size in layers.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - in_layers
    per_weight = bytes_per_weight(n.quantization, is_double=n.double_quantization, compute=compute)
    dense = in_layers * compute if resolved.device == "cpu" and n.quantization in PACKED else 0
    is_kept = dense <= room
    largest = max(math.prod(size) for size in layers.values())

    ends = sum(sum(size) for size in layers.values()) * load.tokens * compute  # in and out of every linear layer
    of_adapter = len(targets) * lora.r * load.tokens * adapter
    if lora.dropout:  # the dropped input, and the mask
        of_adapter += sum(n_in for _, n_in in targets.values()) * load.tokens * (compute + 1)
    if lora.method in (Method.dora, *FROM_WEIGHTS):  # the base's part of the output beside the adapter's
        of_adapter += sum(n_out for n_out, _ in targets.values()) * load.tokens * compute
    if train.gradient_checkpointing:
        inputs = shape.num_hidden_layers * shape.hidden_size * load.tokens * compute
        kept = (ends + of_adapter) / shape.num_hidden_layers  # of the one block that is computed again
        activations = exactly(inputs) + scaled(kept, KEPT[resolved.device])
    else:
        activations = scaled(ends, KEPT[resolved.device]) + exactly(of_adapter)
    in_flight = scaled(ends / shape.num_hidden_layers, IN_FLIGHT[resolved.device])
    weights_in_use = largest * compute * (4 if lora.method is Method.dora else 1)  # dora: B A, their sum and its square
    return Estimate(
        held={
            "weights": exactly(in_layers * per_weight + others * compute),
            "unpacked": exactly(dense if is_kept else 0),
            "adapter": exactly((COPIES + (lora.method in FROM_WEIGHTS)) * trained * adapter),
            "optimizer": optimizer_states(train.optimizer, trained, adapter),
            "process": Range(*PROCESS[resolved.device]),
        },
        step={
            "gradients": exactly(trained * adapter),
            "activations": activations,
            "logits": scaled(load.labelled * shape.vocab_size * BYTES["float32"], LOGITS),
            "workspace": in_flight + exactly(weights_in_use),
        },
        sampling={"unpacked": exactly(dense if train.samples and not is_kept else 0)},
    )


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the output embedding: what is quantized, and what an adapter sits on."""
    modules: Mapping[str, Any] = dict(model.named_modules())
    sizes = {name: tuple(modules[name].weight.shape) for name in adapters.linear_layers(model)}
    return {
        name: size if isinstance(modules[name], nn.Linear) else (size[1], size[0])  # GPT-2's Conv1D lies the other way
        for name, size in sizes.items()
    }


def targets_of(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The layers an adapter sits on; none where none does."""
    return [] if lora.method in (Method.full, *VIRTUAL) else adapters.resolve_targets(model, lora.target_modules)


def trainable_parameters(model: PreTrainedModel, lora: Lora) -> int:
    """How many numbers are trained.

    lora, pissa, olora   r (in + out) for each target: A is (r, in), B is (out, r)
    dora                 and a length for each of out
    ia3                  in for each target of the MLP, out for any other
    prompt_tuning        one embedding a virtual token; prefix_tuning: a key and a value in every layer
    full                 every weight, or those of the last layers; and with every method lora.modules_to_save
    """
    layers, targets = linear_layers(model), targets_of(model, lora)
    shape = model.config.get_text_config()
    whole = adapters.whole_modules(model, lora, targets) if lora.method not in VIRTUAL else []
    found = {id(p): p.numel() for name in whole for p in model.get_submodule(name).parameters()}
    total = sum(found.values())  # tied weights once
    if lora.method is Method.prompt_tuning:
        return total + lora.virtual_tokens * shape.hidden_size
    if lora.method is Method.prefix_tuning:
        heads = shape.num_key_value_heads * (getattr(shape, "head_dim", None) or width_of_head(shape))
        return total + lora.virtual_tokens * shape.num_hidden_layers * 2 * heads
    if lora.method is Method.ia3:
        inner = set(adapters.groups(model)["mlp"])
        return total + sum(layers[name][name in inner] for name in targets)
    low_rank = sum(lora.r * sum(layers[name]) for name in targets)
    lengths = sum(layers[name][0] for name in targets) if lora.method is Method.dora else 0
    return total + low_rank + lengths


def width_of_head(shape: Any) -> int:
    return int(shape.hidden_size // shape.num_attention_heads)


def optimizer_states(optimizer: Optimizer, trained: int, adapter: int) -> Range:
    """Adam's two moments; a paged optimizer may move them out of the GPU."""
    size = 2 * trained * (1 if "8bit" in optimizer else adapter)
    return Range(0 if "paged" in optimizer else size, size, size)


def bytes_per_weight(quantization: Quantization, *, is_double: bool, compute: int) -> float:
    """Of a linear layer, its scales included.

    nf4, fp4   0.5 + 4/64 = 0.5625; double quantization: 0.5 + 1/64 + 4/(64 x 256) = 0.5159
    int8       1; a scale for each row is next to nothing
    """
    if quantization is Quantization.none:
        return compute
    if quantization is Quantization.int8:
        return 1
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
