"""bitsandbytes NF4: four bits a weight, loaded by transformers directly."""

from dataclasses import replace
from pathlib import Path

from stages.lib import merging, models
from stages.lib.schema.numerics import Numerics, Quantization


def write(merged: Path, folder: Path, n: Numerics) -> None:
    """Quantize while loading, and save before any forward pass: on some CPUs the first one repacks the weights."""
    model = models.load_base(merged, replace(n, quantization=Quantization.nf4))
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    merging.copy_unchanged(merged, folder)


def bits_per_weight(folder: Path, weights: int) -> float:
    """Bits on disk per weight, scales and 16-bit embeddings included."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 8 / weights, 3)
