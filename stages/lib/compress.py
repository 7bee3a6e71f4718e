"""Quantize a model with llmcompressor, in the environment of its own that this runs in.

python -m stages.lib.compress <model folder> <folder> <W4A16|W8A8> <rows.json>

rows.json: token ids of training rows. Imports nothing of the project that this environment lacks packages for.

W4A16   weights of 4 bits in groups, rounded by GPTQ on the rows; activations as they are
W8A8    weights of 8 bits by output channel, activations of 8 bits by token, scaled as they come; needs no rows
"""

import json
import sys
from pathlib import Path
from typing import Any

GROUPS = (128, 64, 32)  # vLLM's kernels take these; the largest that divides every layer's inputs


def main(model: str, folder: str, scheme: str, rows: str) -> None:
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    # float32 while the rounding is computed: GPTQ inverts matrices.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    dtype = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["dtype"]
    if scheme == "W8A8":
        oneshot(model=loaded, recipe=eight_bits())
    else:
        read = json.loads(Path(rows).read_text(encoding="utf-8"))
        longest = max(map(len, read))
        oneshot(
            model=loaded,
            recipe=four_bits(loaded),
            dataset=as_dataset(read),
            num_calibration_samples=len(read),
            max_seq_length=longest,
            shuffle_calibration_samples=False,
        )
    for weight in loaded.parameters():
        if weight.dtype == torch.float32:
            weight.data = weight.data.to(getattr(torch, dtype))
    loaded.config.dtype = getattr(torch, dtype)
    loaded.config._name_or_path = ""
    loaded.save_pretrained(folder, save_compressed=True)
    (Path(folder) / "recipe.yaml").unlink(missing_ok=True)  # config.json says the same


def eight_bits() -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])


def four_bits(model: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    group = group_size([layer.in_features for name, layer in model.named_modules() if is_quantized(name, layer)])
    # Scales that make the squared error least, not the ones that hold the largest weight: mean KL of SmolLM2-135M
    # 0.08 instead of 0.20; without GPTQ 0.72.
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, observer="mse"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def is_quantized(name: str, layer: Any) -> bool:
    from torch import nn

    return isinstance(layer, nn.Linear) and not name.endswith("lm_head")


def group_size(inputs: list[int]) -> int:
    """The largest group that divides all rows.

    Raises: SystemExit, when none does.
    """
    for size in GROUPS:
        if all(count % size == 0 for count in inputs):
            return size
    sys.exit(f"no group of {', '.join(map(str, GROUPS))} weights divides rows of {sorted(set(inputs))}")


def as_dataset(rows: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


if __name__ == "__main__":
    main(*sys.argv[1:])
