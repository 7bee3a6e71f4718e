"""The adapter alone, for serving models/base with one or several adapters through PEFT."""

import math
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from stages.lib import merging, models, numerics
from stages.lib.export.formats.exporter import Size, Trained
from stages.lib.export.formats.transformers_folder import TransformersFolder

FILES = (models.WEIGHTS, "adapter_config.json")


class Adapter(TransformersFolder):
    """With the tokenizer and template it was trained with; the 4-bit base comes from models/base."""

    runtime = "transformers, PEFT"
    measured_in = "transformers, on the 4-bit base"

    def __init__(self) -> None:
        super().__init__("adapter")

    def write(self, trained: Trained, path: Path) -> None:
        path.mkdir()
        for name in FILES:
            (path / name).write_bytes((trained.adapter / name).read_bytes())
        merging.copy_unchanged(trained.base, path)

    def size(self, path: Path, weights: int) -> Size:
        """Bits of its own weights, not spread over the base's."""
        with safe_open(path / models.WEIGHTS, framework="pt") as stored:
            own = sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())
        return super().size(path, own)

    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        n = trained.numerics
        return models.load_tuned(trained.base, path, n, dense=numerics.resolve(n).device == "cpu")
