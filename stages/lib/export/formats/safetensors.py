"""The merged model itself, as a plain 16-bit Hugging Face folder."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from stages.lib import models
from stages.lib.export.formats.exporter import Trained
from stages.lib.export.formats.transformers_folder import TransformersFolder


class Safetensors(TransformersFolder):
    def __init__(self) -> None:
        super().__init__("safetensors")

    def write(self, trained: Trained, path: Path) -> None:
        path.mkdir()
        for file in sorted(trained.merged.iterdir()):
            shutil.copyfile(file, path / file.name)

    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        return models.load_dense(path, trained.numerics)
