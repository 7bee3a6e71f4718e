"""The adapter on the frozen base: which method, which layers it sits on, how it is written down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from stages.lib import files, kernels, numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Lora


def add_adapter(base: PreTrainedModel, p: Lora) -> PeftModel:
    """Wrap the base with a LoRA adapter that changes nothing yet (B = 0), drawn from torch's present random state.

    Raises: ConfigError, when lora.target_modules name layers that the base does not have.
    """
    targets = resolve_targets(base, p.target_modules)
    config = LoraConfig(
        r=p.r,
        lora_alpha=p.alpha,
        lora_dropout=p.dropout,
        target_modules=short_names(base, targets),
        task_type="CAUSAL_LM",
    )
    if base.device.type == "cpu":
        config._register_custom_module({bnb.nn.Linear4bit: kernels.FusedLora, nn.Linear: kernels.FusedLinear})
    base.set_attn_implementation(kernels.DOCUMENTS)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    kernels.quicken(model)
    return model


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Full names of the layers an adapter can sit on: every linear layer but the output embedding."""
    head = base.get_output_embeddings()
    return sorted(n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head)


def resolve_targets(base: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    """Full names of the layers that lora.target_modules means.

        all-linear           every linear layer of the blocks
        attention, mlp       those inside, or not inside, an attention module
        [q_proj, 0.mlp.up_proj]   those whose name ends so, at a dot; each entry has to match

    Raises: ConfigError, when an entry matches nothing; the message lists what exists.
    """
    layers = linear_layers(base)
    in_attention = [name for name in layers if any("attn" in part or "attention" in part for part in name.split("."))]
    groups = {
        "all-linear": layers,
        "attention": in_attention,
        "mlp": [name for name in layers if name not in in_attention],
    }
    if isinstance(wanted, str):
        entries = {wanted: groups[wanted]}
    else:
        entries = {entry: _ending(layers, entry) for entry in wanted}
    if unmatched := [entry for entry, found in entries.items() if not found]:
        existing = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ConfigError(
            f"lora.target_modules: {unmatched} of {wanted!r} match no layer of {type(base).__name__}, "
            f"expected all-linear, attention, mlp, or a list of names among {existing}"
        )
    return sorted({name for found in entries.values() for name in found})


def short_names(base: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The shortest way to name the targets in adapter_config.json: last parts where these mean no other layer."""
    last = sorted({name.rsplit(".", 1)[-1] for name in targets})
    meant = {name for entry in last for name in _ending(linear_layers(base), entry)}
    return last if meant == set(targets) else list(targets)


def _ending(layers: Sequence[str], entry: str) -> list[str]:
    return [name for name in layers if name == entry or name.endswith(f".{entry}")]


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: the adapter's, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT reads it: safetensors and a configuration whose bytes depend on its content alone."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template of a card, with the path of the base; ours comes with the export
    path = folder / "adapter_config.json"
    config = files.read_json(path)
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, in hash order
    config["base_model_name_or_path"] = "models/base"
    files.write_json(path, config)


def describe(model: PeftModel, p: Lora, resolved: numerics.Resolved) -> dict[str, Any]:
    """What was trained, for models/adapter/trained.json."""
    parameters = trainable(model)
    modules = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in parameters})
    return {
        "modules": modules,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "scaling": p.alpha / p.r,
        "adapter_dtype": resolved.adapter_dtype,
        "compute_dtype": resolved.compute_dtype,
    }
