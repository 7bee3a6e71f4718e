"""Importance matrix: how large the inputs of each linear layer are on training text, channel by channel.

An error in a weight counts in the output by what it is multiplied with; k-quants can take that into account when they
choose scales:  minimise  sum over channels j of  importance[j] (w[j] - quantized w[j])²
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.lib import chat, held_out, records
from stages.lib.errors import DataError


def training_text(splits: Path, model: Path, count: int) -> list[list[int]]:
    """Token ids of `count` training conversations, every task represented, the choice fixed by the ids.

    Raises: DataError, when there are fewer usable ones.
    """
    tokenizer = chat.load_tokenizer(model)
    rows, _ = held_out.usable(tokenizer, records.read(splits / "train.parquet"))
    if len(rows) < count:
        raise DataError(
            f"{splits / 'train.parquet'}: {len(rows)} usable rows, expected the {count} of "
            "export.imatrix_rows. Lower it."
        )
    return [[int(token) for token in held_out.encode(tokenizer, row).input_ids] for row in held_out.spread(rows, count)]


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Mean over all tokens of the square of each input channel, for every linear layer but the output embedding.

    One row at a time: nothing is padded, and the numbers do not depend on the threads.
    Args: rows: token ids. Returns: name of the layer's weight -> (in,), float32.
    """
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def watch(name: str) -> object:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] += inputs[0].flatten(0, -2).double().square().sum(dim=0).cpu()

        return layers[name].register_forward_pre_hook(add)

    hooks = [watch(name) for name in layers]
    try:
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    tokens = sum(map(len, rows))
    return {f"{name}.weight": (total / tokens).float() for name, total in sums.items()}
