"""bitsandbytes NF4: four bits a weight, loaded by transformers directly."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from stages.lib import merging, models
from stages.lib.schema.numerics import Numerics, Quantization


def write(merged: Path, folder: Path, n: Numerics) -> None:
    """Quantize while loading, and save before any forward pass: on some CPUs the first one repacks the weights.

    What NF4 leaves alone (embeddings, norms) is saved in the merged model's 16-bit type, whatever this machine computes
    in: at float32 the embeddings alone would outweigh all 4-bit weights of a small model.
    """
    model = models.load_base(merged, replace(n, quantization=Quantization.nf4))
    dtype = AutoConfig.from_pretrained(merged, local_files_only=True).dtype
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    merging.copy_unchanged(merged, folder)


def bits_per_weight(folder: Path, weights: int) -> float:
    """Bits on disk per weight, scales and 16-bit embeddings included."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 8 / weights, 3)
