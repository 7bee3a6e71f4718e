"""Merge a LoRA adapter into ordinary weights: W + (alpha / r) B A, in float32, never in place on 4-bit weights.

merge.base     W
dequantized    models/base through NF4 and back, the values the adapter was trained on
original       models/base as it is
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from stages.lib import chat, files, models
from stages.lib.errors import ModelError
from stages.lib.schema.merge import Base, Dtype
from stages.lib.schema.numerics import ComputeDtype, Numerics, Quantization


def merge(base: Path, adapter: Path, into: Base, numerics: Numerics) -> PreTrainedModel:
    """The merged model in float32, an ordinary transformers model without a trace of PEFT.

    Raises: ModelError, when the adapter does not fit, holds NaN, or changes nothing.
    """
    exact = replace(numerics, compute_dtype=ComputeDtype.float32, adapter_dtype=ComputeDtype.float32)
    if into is Base.original:
        exact = replace(exact, quantization=Quantization.none)
    tuned = models.load_tuned(base, adapter, exact, dense=True)
    changed = largest_update(tuned)
    if not math.isfinite(changed):
        raise ModelError(f"{adapter}: holds NaN or infinity. Lower train.learning_rate and run qlora_train again.")
    if changed == 0:
        raise ModelError(
            f"{adapter}: its update of every weight is zero, so the merged model would be the base. "
            "Train longer or with another train.learning_rate."
        )
    return tuned.merge_and_unload()


def largest_update(tuned: PeftModel) -> float:
    """The largest absolute change the adapter makes to a weight; NaN where one is NaN."""
    updates = [
        layer.get_delta_weight(name).abs().max()
        for layer in tuned.modules()
        if hasattr(layer, "get_delta_weight")
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
    return torch.stack(updates).max().item() if updates else 0.0


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
