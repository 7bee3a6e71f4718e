"""Let a model read prompts in batches, ready to score answers after them or to continue them.

A prompt is read once and serves both. What all prompts begin with (the system turn, the examples of a few-shot prompt)
is read once for all of them. Rows are padded on the left, so that every row's last token stands in the last column;
positions count unmasked tokens only. Hence a row's numbers do not depend on the rows beside it, beyond float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

PAD = 0  # any valid id: padded positions are masked out of attention, and what is computed there is never read


@dataclass
class Read:
    """A batch of prompts that the model has read.

    rows: (B,) places of the prompts in the caller's list.
    cache: keys and values of all positions so far, T columns, with room for more.
    mask: (B, T), 1 where a token stands, 0 where padding does.
    logits: (B, V), for the token after each prompt.
    """

    model: PreTrainedModel
    rows: list[int]
    cache: Cache
    mask: torch.Tensor
    logits: torch.Tensor

    def next_positions(self) -> torch.Tensor:
        """Position of the token after each prompt, (B,)."""
        return self.mask.sum(dim=-1)

    def forget(self, n_columns: int) -> None:
        """Take back the last columns written to the cache; no keys or values are copied."""
        self.cache.crop(-n_columns)


@torch.inference_mode()
def in_batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, room: int, batch_size: int
) -> Iterator[Read]:
    """Read prompts, longest first, so that little is padded and memory peaks at once rather than late.

    Args: prompts: T_i token ids each, at least one. room: columns to reserve behind each prompt.
    """
    if not prompts:
        return
    shared = common_prefix(prompts)
    prefix = _read_prefix(model, prompts[0][:shared]) if shared else []
    for rows in by_length([len(prompt) for prompt in prompts], batch_size=batch_size):
        ids, tail_mask = left_padded([prompts[row][shared:] for row in rows], model.device)
        mask = torch.cat([tail_mask.new_ones(len(rows), shared), tail_mask], dim=1)
        cache = _reserved(model, prefix, len(rows), mask.shape[1] + room)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, shared:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        yield Read(model, rows, cache, mask, output.logits[:, -1])


def by_length(lengths: Sequence[int], *, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches, longest first; equal lengths keep their order.

    lengths [3, 9, 5], batch_size 2  ->  [1, 2] [0]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token sequences as one matrix, padded on the left.

        [[5, 6], [7]]  ->  ids [[5, 6], [0, 7]]   mask [[1, 1], [0, 1]]

    Returns: ids and mask, (B, T) each, int64.
    """
    width = max(len(row) for row in rows)
    ids = [[PAD] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token, counted over unmasked tokens; padding gets 0. (B, T) -> (B, T)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all rows begin with, leaving at least one token to each row.

    [[1, 2, 3], [1, 2, 4, 5]]  ->  2      [[1, 2], [1, 2, 3]]  ->  1, for the first row keeps its last token
    """
    length = 0
    for column in zip(*(row[:-1] for row in rows), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


class _ReservedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """Keys and values of one layer in memory reserved once; the library's own layer copies all of it at every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.all_keys = key_states.new_empty(rows, heads, self.room, width)
            self.all_values = value_states.new_empty(rows, heads, self.room, value_states.shape[-1])
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        length = self.get_seq_length()
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self.keys, self.values = self.all_keys[:, :, :length], self.all_values[:, :, :length]


def _read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer for one row of token ids."""
    cache = _reserved(model, [], 1, len(ids))
    model(
        input_ids=torch.tensor([list(ids)], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _reserved(model: PreTrainedModel, prefix: list[tuple[torch.Tensor, torch.Tensor]], rows: int, room: int) -> Cache:
    """A cache with room for so many columns, whose rows all begin with the prefix."""
    layers = [_ReservedLayer(room) for _ in range(model.config.get_text_config().num_hidden_layers)]
    for layer, (keys, values) in zip(layers, prefix, strict=False):
        layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
    return Cache(layers=layers)
