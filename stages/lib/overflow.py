"""Whether what a model computes fits into the 16-bit type it is saved in: float16 ends at 65,504, bfloat16 does not.

Gemma 3 was trained in bfloat16; its hidden states reach 100,000. Its weights fit into float16, and in that type
transformers answers with NaN.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stages.lib.errors import ModelError

ROWS = 4
"""Enough: what is large is so at the first token of any row."""


@torch.inference_mode()
def check(model: PreTrainedModel, rows: Sequence[Sequence[int]], dtype: str) -> None:
    """Hold hidden states, computed in a wider type, to the range of `dtype`.

    Args: rows: token ids of conversations, of which the first few are looked at. dtype: torch's name of it.
    Raises: ModelError, naming the largest one.
    """
    limit = torch.finfo(getattr(torch, dtype)).max
    for row in rows[:ROWS]:
        ids = torch.tensor([list(row)], device=model.device)
        found = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states
        largest = max(float(state.abs().max()) for state in found)
        if not largest <= limit:
            raise ModelError(
                f"models/merged: hidden states reach {largest:,.0f}, {dtype} ends at "
                f"{limit:,.0f}: whoever loads the model as it is saved gets NaN. Set merge.dtype=bfloat16."
            )
