"""bitsandbytes: weights of four or eight bits, loaded by transformers directly."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from stages.lib import merging, models, numerics
from stages.lib.export.formats.exporter import Trained
from stages.lib.export.formats.transformers_folder import TransformersFolder
from stages.lib.schema.merge import Base
from stages.lib.schema.numerics import Quantization

_FOUR_BITS = (Quantization.nf4, Quantization.fp4)


class BitsAndBytes(TransformersFolder):
    quantization: Quantization

    def merged(self, trained: Trained) -> Path:
        """The 16-bit folder that is quantized."""
        return trained.merged

    def write(self, trained: Trained, path: Path) -> None:
        """Quantize while loading, and save before any forward pass: on some CPUs the first one repacks the weights.

        What is not quantized (embeddings, norms) is saved in the merged model's 16-bit type, whatever this machine
        computes in: at float32 the embeddings alone would outweigh all 4-bit weights of a small model.
        """
        model = models.load_base(self.merged(trained), replace(trained.numerics, quantization=self.quantization))
        dtype = AutoConfig.from_pretrained(trained.merged, local_files_only=True).dtype
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
        model.config.dtype = dtype
        model.config._name_or_path = ""
        model.save_pretrained(path)
        merging.copy_unchanged(trained.merged, path)


class Nf4(BitsAndBytes):
    """On a CPU its layers are unpacked to the values they multiply with: equal to the bit, and many times faster."""

    quantization = Quantization.nf4

    def __init__(self) -> None:
        super().__init__("bnb_nf4")

    def merged(self, trained: Trained) -> Path:
        """A merge into the base as it was before quantization, unless models/merged is one.

        A base that went through NF4 stands on NF4's grid. The adapter moves most weights by less than half a step, so
        quantizing them again rounds every one of them back: bit for bit the base, and nothing left of the training.
        """
        if trained.numerics.quantization not in _FOUR_BITS or trained.merge.base is Base.original:
            return trained.merged
        folder = trained.scratch / "original"
        recipe = replace(trained.merge, base=Base.original, adapters={})  # trained.adapter holds them
        merging.save(merging.merge(trained.base, trained.adapter, recipe, trained.numerics), trained.base, folder)
        return folder

    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        n = trained.numerics
        return models.load_base(path, n, dense=numerics.resolve(n).device == "cpu")


class Int8(BitsAndBytes):
    """LLM.int8(): its layers round their inputs, too, so they stay as they are."""

    quantization = Quantization.int8

    def __init__(self) -> None:
        super().__init__("bnb_int8")

    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        return models.load_base(path, trained.numerics)
