"""The weights of a base through numerics.quantization and back, one at a time: what an adapter was trained on."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.quantizers.auto import AutoHfQuantizer

from stages.lib import adapters, files, models, numerics, unpacking
from stages.lib.schema.numerics import Numerics, Quantization


class Requantized:
    """What models.load_base makes of a folder's weights, without holding more than one of them.

    names: full names of the layers it quantizes; none where numerics.quantization or the folder leaves nothing to do.
    """

    def __init__(self, folder: Path, n: Numerics) -> None:
        self._resolved = numerics.resolve(n)
        self._compute = getattr(torch, self._resolved.compute_dtype)
        self.names: frozenset[str] = frozenset()
        if n.quantization is Quantization.none or "quantization_config" in files.read_json(folder / "config.json"):
            return
        quantizer = AutoHfQuantizer.from_config(models.quantized(n, self._compute), pre_quantized=False)
        with torch.device("meta"):
            self._layers = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        quantizer.preprocess_model(self._layers, device_map=None)
        self._quantize = quantizer.get_quantize_ops()
        self.names = frozenset(
            name for name, layer in self._layers.named_modules() if isinstance(layer, adapters.QUANTIZED)
        )

    def values(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What a layer multiplies with once it was quantized from `weight`, equal to the bit: float32, on the CPU.

        Args: weight: as the folder holds it, (out, in), or (in, out) of a Conv1D. Returns: the same shape.
        """
        layer, key = self._layers.get_submodule(name), f"{name}.weight"
        empty = layer.weight
        on_device = weight.to(self._resolved.device, self._compute)
        layer.weight = self._quantize.convert({key: on_device}, model=self._layers)[key]
        is_4_bit = isinstance(layer, bnb.nn.Linear4bit)
        found = (
            unpacking.dequantized(layer, self._compute)
            if is_4_bit
            else dequantize_bnb_weight(layer.weight, bnb.MatmulLtState())
        )
        layer.weight = empty
        turned = found if issubclass(layer.source_cls, nn.Linear) else found.T
        return turned.to("cpu", torch.float32)
