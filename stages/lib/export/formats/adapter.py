"""The adapter alone, for serving models/base with one or several adapters through PEFT."""

from pathlib import Path

from transformers import PreTrainedModel

from stages.lib import merging, models
from stages.lib.export.formats.exporter import Trained
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

    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        return models.load_tuned(trained.base, path, trained.numerics, dense=True)
