"""Merge an adapter into ordinary weights, in float32, never in place on quantized ones.

method          merged
low rank        W + s B A; dora: its rows scaled to the lengths that were learned
ia3             W, its rows scaled, or its columns where the layer scales what goes in
trained whole   the trained weights

merge.base      W
dequantized     models/base through numerics.quantization and back, the values the adapter was trained on
original        models/base as it is
"""

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import PreTrainedModel

from stages.lib import adapters, chat, files, models
from stages.lib.errors import ConfigError, ModelError
from stages.lib.schema.merge import Base, Dtype
from stages.lib.schema.numerics import ComputeDtype, Numerics, Quantization


def check_mergeable(adapter: Path) -> None:
    """Is there a weight to merge into? Known without loading a model.

    Raises: ConfigError, for virtual tokens.
    """
    method = files.read_json(adapter / "adapter_config.json")["peft_type"]
    if method in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise ConfigError(
            f"lora.method: {adapter} holds virtual tokens ({method.lower()}), which stand before a prompt and cannot "
            "be merged into weights, expected another method for merge and quantize_export. Stop at `dvc repro "
            "evaluate`, serve models/base with models/adapter through PEFT, or train lora.method=lora."
        )


def merge(base: Path, adapter: Path, into: Base, numerics: Numerics) -> PreTrainedModel:
    """The merged model in float32, an ordinary transformers model without a trace of PEFT.

    Raises: ConfigError, when the method cannot be merged. ModelError, when the adapter does not fit, holds NaN, or
    changes nothing.
    """
    check_mergeable(adapter)
    exact = replace(numerics, compute_dtype=ComputeDtype.float32, adapter_dtype=ComputeDtype.float32)
    if into is Base.original:
        exact = replace(exact, quantization=Quantization.none)
    if not all(tensor.isfinite().all() for tensor in load_file(adapter / "adapter_model.safetensors").values()):
        raise ModelError(f"{adapter}: holds NaN or infinity. Lower train.learning_rate and run qlora_train again.")
    tuned = models.load_mergeable(base, adapter, exact)
    if largest_update(tuned) == 0:
        raise ModelError(
            f"{adapter}: its update of every weight is zero, so the merged model would be the base. "
            "Train longer or with another train.learning_rate."
        )
    return tuned.merge_and_unload()


def largest_update(tuned: PeftModel) -> float:
    """The largest absolute change the adapter makes: to a weight, or of an ia3 vector from the ones it starts with."""
    found = [0.0]
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            found.append(layer.get_delta_weight(adapters.NAME).abs().max().item())
        elif isinstance(layer, IA3Layer):
            found.append((layer.ia3_l[adapters.NAME] - 1).abs().max().item())
        elif isinstance(layer, ModulesToSaveWrapper):
            pairs = zip(
                layer.modules_to_save[adapters.NAME].parameters(), layer.original_module.parameters(), strict=True
            )
            found += [(one - other).abs().max().item() for one, other in pairs]
    return max(found)


def save(model: PreTrainedModel, base: Path, folder: Path, dtype: Dtype) -> None:
    """Write a Hugging Face folder that is complete without the base: weights, tokenizer, template, generation config.

    Raises: ModelError, when a weight is too large for float16.
    """
    model = model.to(getattr(torch, dtype))
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{name}: does not fit into {dtype}, expected finite numbers. Set merge.dtype=bfloat16.")
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    chat.load_tokenizer(base).save_pretrained(folder)
    copy_unchanged(base, folder)


def copy_unchanged(base: Path, folder: Path) -> None:
    """Everything that says how text becomes tokens and when to stop comes over byte for byte, not as re-saved."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template.*", "generation_config.json"):
        for path in sorted(base.glob(pattern)):
            (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.iterdir():
        path.chmod(0o644)


def is_equal(one: Path, other: Path) -> bool:
    """Do two folders hold the same weight bytes?"""
    digests = [sorted(files.sha256(path) for path in folder.glob("*.safetensors")) for folder in (one, other)]
    return digests[0] == digests[1]


def weights_mib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20, 2)
