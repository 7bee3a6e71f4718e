"""What is trained beside the frozen base: by which method, where it sits, how it is written down.

Every method is a PEFT model: `with model.disable_adapter()` gives the base, and what is saved is what is trained.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from stages.lib import files, kernels, numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import FROM_WEIGHTS, LOW_RANK, VIRTUAL, AlphaMode, Lora, Method

QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
NAME = "default"
"""PEFT's name of the adapter, where there is one."""


def add_adapter(base: PreTrainedModel, p: Lora) -> PeftModel:
    """Wrap the base with what lora.method trains, drawn from torch's present random state.

    It changes nothing yet (pissa and olora: up to rounding), except virtual tokens, which every prompt sees at once.

    Raises: ConfigError, when lora.target_modules, modules_to_save, last_layers or r ask for what the base has not.
    """
    if p.method in VIRTUAL:
        return _with_virtual_tokens(base, p)
    base.set_attn_implementation(kernels.DOCUMENTS)
    targets = [] if p.method is Method.full else resolve_targets(base, p.target_modules)
    config = _config(base, p, targets)
    is_int8 = getattr(base, "is_loaded_in_8bit", False)  # an 8-bit layer is an nn.Linear, too; PEFT has one of its own
    if p.method is Method.lora and base.device.type == "cpu" and not is_int8:
        config._register_custom_module({bnb.nn.Linear4bit: kernels.FusedLora, nn.Linear: kernels.FusedLinear})
    written = config.target_modules
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    config.target_modules = written  # PEFT shortens long lists
    if p.method in FROM_WEIGHTS:
        _start_from_weights(model, p)
    keep_types(model)
    if p.method is Method.lora:
        kernels.quicken(model)
    return model


def _config(base: PreTrainedModel, p: Lora, targets: Sequence[str]) -> PeftConfig:
    """The method in PEFT's words."""
    whole = whole_modules(base, p, targets)
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": whole or None}
    is_tied = bool(set(whole) & set(_tied(base)))
    if p.method is Method.full:
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, ensure_weight_tying=is_tied, **shared)
    shared["fan_in_fan_out"] = isinstance(base.get_submodule(targets[0]), Conv1D)
    if p.method is Method.ia3:
        if is_tied:
            raise ConfigError(
                f"lora.modules_to_save: found {p.modules_to_save} with lora.method=ia3, but this base ties input and "
                f"output embeddings, which PEFT keeps tied with {', '.join(LOW_RANK)} only. Choose one of these."
            )
        inner = [name for name in targets if name in groups(base)["mlp"]]
        return IA3Config(target_modules=list(targets), feedforward_modules=inner, **shared)
    return LoraConfig(
        r=p.r,
        lora_alpha=p.alpha * p.r if p.alpha_mode is AlphaMode.ratio else p.alpha,
        use_rslora=p.alpha_mode is AlphaMode.rslora,
        use_dora=p.method is Method.dora,
        lora_dropout=p.dropout,
        target_modules=short_names(base, targets),
        ensure_weight_tying=is_tied,
        **shared,
    )


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Full names of the layers an adapter can sit on: every linear layer but the output embedding."""
    head = base.get_output_embeddings()
    return sorted(n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)


def groups(base: PreTrainedModel) -> dict[str, list[str]]:
    """The linear layers by the names that lora.target_modules knows for them."""
    layers = linear_layers(base)
    in_attention = [name for name in layers if any("attn" in part or "attention" in part for part in name.split("."))]
    return {
        "all-linear": layers,
        "attention": in_attention,
        "mlp": [name for name in layers if name not in in_attention],
    }


def resolve_targets(base: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    """Full names of the layers that lora.target_modules means.

        all-linear           every linear layer of the blocks
        attention, mlp       those inside, or not inside, an attention module
        [q_proj, 0.mlp.up_proj]   those whose name ends so, at a dot; each entry has to match
        .*layers\\.[01]\\..*   any other text: those whose whole name this regular expression matches

    Raises: ConfigError, when an entry matches nothing; the message lists what exists.
    """
    known = groups(base)
    layers = known["all-linear"]
    if not isinstance(wanted, str):
        entries = {entry: _ending(layers, entry) for entry in wanted}
    else:
        entries = {wanted: known.get(wanted) or [name for name in layers if re.fullmatch(wanted, name)]}
    if unmatched := [entry for entry, found in entries.items() if not found]:
        existing = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ConfigError(
            f"lora.target_modules: {unmatched} of {wanted!r} match no layer of {type(base).__name__}, "
            f"expected all-linear, attention, mlp, a list of names among {existing}, or a regular expression that "
            f"matches full names such as {layers[0]}"
        )
    return sorted({name for found in entries.values() for name in found})


def whole_modules(base: PreTrainedModel, p: Lora, targets: Sequence[str]) -> list[str]:
    """Full names of the modules that are trained whole: lora.modules_to_save, or what lora.method=full asks for.

    Raises: ConfigError, when a name matches nothing, is quantized, or holds a layer that has an adapter of its own.
    """
    names = [name for name, _ in base.named_modules() if name]
    found = {entry: _ending(names, entry) for entry in p.modules_to_save}
    if unmatched := [entry for entry, ends in found.items() if not ends]:
        raise ConfigError(
            f"lora.modules_to_save: {unmatched} match no module of {type(base).__name__}, expected names such as "
            f"{_embeddings(base)}"
        )
    whole = {name for ends in found.values() for name in ends}
    if p.method is Method.full:
        whole |= set(_of_last_layers(base, p.last_layers) if p.last_layers else _with_weights(base))
    for name in sorted(whole):
        inside = [target for target in targets if f"{target}.".startswith(f"{name}.")]
        if inside:
            raise ConfigError(
                f"lora.modules_to_save: {name} holds {inside[0]}, which lora.target_modules names, too. "
                "Take one of them out."
            )
        if any(isinstance(module, QUANTIZED) for module in base.get_submodule(name).modules()):
            raise ConfigError(
                f"lora.modules_to_save: {name} is quantized and cannot be trained. Set numerics.quantization=none, or "
                f"name modules that stay unquantized: {_embeddings(base)} and norms."
            )
    return sorted(whole)


def _with_weights(base: PreTrainedModel, within: str = "") -> list[str]:
    """Full names of the modules that hold weights themselves, inside a part of the base."""
    return [
        name
        for name, module in base.named_modules()
        if f"{name}.".startswith(within) and any(True for _ in module.parameters(recurse=False))
    ]


def _of_last_layers(base: PreTrainedModel, k: int) -> list[str]:
    """What holds weights in the last k blocks."""
    n = base.config.get_text_config().num_hidden_layers
    blocks = next(name for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    if k > n:
        raise ConfigError(f"lora.last_layers: found {k}, expected at most the {n} layers of {type(base).__name__}.")
    return [name for i in range(n - k, n) for name in _with_weights(base, f"{blocks}.{i}.")]


def _embeddings(base: PreTrainedModel) -> list[str]:
    """Full names of the input and the output embedding."""
    found = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, module in base.named_modules() if any(module is one for one in found)]


def _tied(base: PreTrainedModel) -> list[str]:
    """Full names of the embeddings when they are one matrix."""
    head = base.get_output_embeddings()
    return _embeddings(base) if head is not None and head.weight is base.get_input_embeddings().weight else []


def short_names(base: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The shortest way to name the targets in adapter_config.json: last parts where these mean no other layer."""
    last = sorted({name.rsplit(".", 1)[-1] for name in targets})
    meant = {name for entry in last for name in _ending(linear_layers(base), entry)}
    return last if meant == set(targets) else list(targets)


def _ending(layers: Sequence[str], entry: str) -> list[str]:
    return [name for name in layers if name == entry or name.endswith(f".{entry}")]


class _FromWeights(LoraVariant):  # type: ignore[misc]  # PEFT is not followed
    """LoRA that starts inside the weights and counts from there: W x + s (B A - B0 A0) x.

    PiSSA and OLoRA take s B0 A0 out of W instead. That is the same function, but the base would then be another one:
    with the adapter off, and after reloading models/base. So W stays, quantized or not, and what is saved is a plain
    LoRA of rank 2r: [B, -B0] [A; A0].
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.a, self.b = (matrix[NAME].weight.detach().clone() for matrix in (layer.lora_A, layer.lora_B))

    def forward(  # type: ignore[override]  # PEFT calls it on the instance
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x = module.lora_dropout[active_adapter](x.to(a.dtype))
        moved = (x @ a.t()) @ b.t() - (x @ self.a.to(a).t()) @ self.b.to(b).t()
        return result + moved.to(result.dtype) * module.scaling[active_adapter]

    def doubled(self, module: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the plain LoRA of rank 2r that is the same function."""
        a, b = module.lora_A[NAME].weight.detach(), module.lora_B[NAME].weight.detach()
        return torch.cat([a, self.a.to(a)]), torch.cat([b, -self.b.to(b)], dim=1)


def _start_from_weights(model: PeftModel, p: Lora) -> None:
    """Let A and B start as PEFT draws them for PiSSA or OLoRA, with the base as it is."""
    start = "olora" if p.method is Method.olora else "pissa_niter_16"  # fast SVD: seconds instead of minutes
    for name, layer in _layers(model):
        base = layer.get_base_layer()
        weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None)).detach().float()
        weight = weight.t() if isinstance(base, Conv1D) else weight  # (out, in)
        if p.r > min(weight.shape):
            raise ConfigError(
                f"lora.r: found {p.r} with lora.method={p.method}, expected at most {min(weight.shape)}, the smaller "
                f"side of {name}."
            )
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        config = model.peft_config[NAME]
        drawn = LoraLinear(
            plain,
            NAME,
            config=LoraConfig(
                r=p.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, init_lora_weights=start
            ),
            r=p.r,
            lora_alpha=config.lora_alpha,
        )
        for mine, its in ((layer.lora_A, drawn.lora_A), (layer.lora_B, drawn.lora_B)):
            mine[NAME].weight.data = its[NAME].weight.data.to(mine[NAME].weight.dtype).contiguous()
        layer.lora_variant[NAME] = _FromWeights(layer)


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _with_virtual_tokens(base: PreTrainedModel, p: Lora) -> PeftModel:
    """Virtual tokens that start as random words of the vocabulary do: their embeddings, or their keys and values."""
    shared: dict[str, Any] = {"num_virtual_tokens": p.virtual_tokens, "task_type": "CAUSAL_LM"}
    if p.method is Method.prompt_tuning:
        return get_peft_model(base, PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **shared))
    model = get_peft_model(base, PrefixTuningConfig(**shared))
    words = torch.randint(base.get_input_embeddings().num_embeddings, (1, p.virtual_tokens)).to(base.device)
    with torch.no_grad():
        read = base.eval()(input_ids=words, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=read)
    return model


def is_virtual(model: nn.Module) -> bool:
    """Are there virtual tokens instead of an adapter in the layers?"""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens stand before every prompt; 0 with the adapter off."""
    if not is_virtual(model) or model._adapters_disabled:
        return 0
    return cast(int, model.active_peft_config.num_virtual_tokens)


def keep_types(model: PeftModel, name: str = NAME) -> None:
    """Let modules that are trained whole compute in the type of their weights, inside a base that has another one."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            outside = next(wrapper.original_module.parameters()).dtype
            wrapper.modules_to_save[name].register_forward_pre_hook(_into_own_type)
            wrapper.modules_to_save[name].register_forward_hook(_out_of_own_type(outside))


def _into_own_type(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    own = next(module.parameters()).dtype
    return tuple(x.to(own) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _out_of_own_type(outside: torch.dtype) -> Any:
    return lambda module, inputs, output: output.to(outside)


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: the adapter's, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of what is trained, by name, put together where processes have shares of it: then all have to ask."""
    found = {name: parameter.detach() for name, parameter in trainable(model).items()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w.clone() for name, w in found.items()}


@torch.no_grad()
def fill(model: PeftModel, values: Mapping[str, torch.Tensor]) -> None:
    """Give what is trained other values, or this process its share of them."""
    for name, parameter in trainable(model).items():
        value = values[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def save(model: PeftModel, folder: Path, values: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter as PEFT reads it: safetensors and a configuration whose bytes depend on its content alone.

    Args: values: what `whole` gave, for a model that processes have shares of.
    """
    state = model.state_dict() | dict(values or {})
    changes: dict[str, Any] = {"base_model_name_or_path": "models/base"}
    for name, layer in _layers(model):
        if isinstance(start := layer.lora_variant.get(NAME), _FromWeights):
            a, b = start.doubled(layer)
            state |= {f"{name}.lora_A.{NAME}.weight": a, f"{name}.lora_B.{NAME}.weight": b}
            r = 2 * layer.r[NAME]
            changes |= {"r": r, "lora_alpha": layer.scaling[NAME] * r, "use_rslora": False}
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template of a card, with the path of the base; ours comes with the export
    path = folder / "adapter_config.json"
    config = files.read_json(path) | changes
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)  # PEFT keeps sets, in hash order
    files.write_json(path, config)


def describe(model: PeftModel, p: Lora, resolved: numerics.Resolved) -> dict[str, Any]:
    """What was trained, for models/adapter/trained.json."""
    parameters = trainable(model)
    inside = [name.removeprefix("base_model.model.") for name in parameters if not is_virtual(model)]
    return {
        "method": str(p.method),
        "modules": sorted({re.split(r"\.(?:lora_|ia3_|modules_to_save\.)", name)[0] for name in inside}),
        "virtual_tokens": virtual_tokens(model),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "scaling": p.scaling if p.method in LOW_RANK else None,
        "adapter_dtype": resolved.adapter_dtype,
        "compute_dtype": resolved.compute_dtype,
        "determinism": resolved.determinism,
    }
