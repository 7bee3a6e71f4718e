"""Let a model read prompts in batches, ready to score answers after them or to continue them.

A prompt is read once and serves both. What all prompts begin with (virtual tokens, the system turn, the examples of a
few-shot prompt) is read once for all of them. Rows are padded on the left, so that every row's last token stands in the
last column; positions count unmasked tokens only. Hence a row's numbers do not depend on the rows beside it, beyond
float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from stages.lib import adapters

PAD = 0  # any valid id: padded positions are masked out of attention, and what is computed there is never read
LINES_PER_PASS = 16  # enough for fast matrix products over many tokens; more lines only bring more padding


@dataclass
class Read:
    """A batch of prompts that the model has read: the longest first, one per line.

    rows: (B,) places of the prompts in the caller's list.
    mask: (B, T), 1 where a token stands, 0 where padding does.
    logits: (B, V), for the token after each prompt.
    """

    model: PreTrainedModel
    rows: list[int]
    mask: torch.Tensor
    logits: torch.Tensor
    window: _Window
    cache: Cache

    def next_positions(self) -> torch.Tensor:
        """Position of the token after each line, (B,)."""
        return self.mask.sum(dim=-1)

    def passes(self) -> Iterator[slice]:
        """The lines, a few at a time: as many as a pass over more than one token each should hold."""
        for start in range(0, len(self.mask), LINES_PER_PASS):
            yield slice(start, start + LINES_PER_PASS)

    def forward(
        self, lines: slice, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *, keep: int
    ) -> torch.Tensor:
        """Run the model over the last columns of some lines, and remember their keys and values there.

        What is remembered at columns written again later is overwritten; so a pass is taken back by not counting it.

        Args: ids, positions: (b, n). mask: (b, C), of all columns up to the last of these n, or (b, 1, n, C), which of
            them each of the n sees, as bool. keep: logits wanted.
        Returns: logits of the last `keep` columns, (b, keep, V).
        """
        self.window.lines, self.window.start = lines, mask.shape[-1] - ids.shape[1]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    def keep_lines(self, lines: list[int]) -> None:
        """Let all other lines leave the batch."""
        index = torch.tensor(lines, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


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
    columns = adapters.virtual_tokens(model) + shared
    prefix = _read_prefix(model, prompts[0][:shared]) if columns else []
    if adapters.is_virtual(model):
        model = model.base_model  # its virtual tokens are in the prefix now
    for rows in by_length([len(prompt) for prompt in prompts], batch_size=batch_size):
        ids, tail_mask = left_padded([prompts[row][shared:] for row in rows], model.device)
        mask = torch.cat([tail_mask.new_ones(len(rows), columns), tail_mask], dim=1)
        window = _Window(len(rows), mask.shape[1] + room)
        read = Read(model, rows, mask, torch.empty(0), window, _cache(model, window, prefix))
        logits = []
        for lines in read.passes():
            width = int(tail_mask[lines].sum(dim=-1).max())
            spots = positions(mask[lines])[:, -width:]
            logits.append(read.forward(lines, ids[lines, -width:], mask[lines], spots, keep=1)[:, -1])
        read.logits = torch.cat(logits)
        yield read


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


@dataclass
class _Window:
    """Where the next pass reads and writes in the memory that all layers reserve: these lines, from this column on."""

    n_lines: int
    n_columns: int
    lines: slice = field(default_factory=lambda: slice(None))
    start: int = 0


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """Keys and values of one layer in memory reserved once; the library's own layer copies all of it at every token."""

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window
        self.memory: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values, (lines, heads, columns, D)

    def get_seq_length(self) -> int:
        return self.window.start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.memory is None:
            # Zeros: a masked column has weight 0, and 0 times what memory happens to hold may be NaN.
            size = self.window.n_lines, key_states.shape[1], self.window.n_columns
            self.memory = (
                key_states.new_zeros(*size, key_states.shape[-1]),
                value_states.new_zeros(*size, value_states.shape[-1]),
            )
        keys, values = self.memory
        lines, start = self.window.lines, self.window.start
        end = start + key_states.shape[-2]
        keys[lines, :, start:end] = key_states
        values[lines, :, start:end] = value_states
        return keys[lines, :, :end], values[lines, :, :end]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        assert self.memory is not None
        keys, values = self.memory
        self.memory = keys[indices], values[indices]


def _read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer for virtual tokens, if there are any, and one row of token ids after them.

    Prefix tuning has keys and values for its tokens; prompt tuning has embeddings, which are read as the others are.
    """
    row = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    window = _Window(1, adapters.virtual_tokens(model) + len(ids))
    if not adapters.virtual_tokens(model):
        cache, inputs = _cache(model, window, []), {"input_ids": row}
    elif isinstance(given := model.get_prompt(1), Cache):
        cache, inputs = (
            _cache(model, window, [(layer.keys, layer.values) for layer in given.layers]),
            {"input_ids": row},
        )
        window.start = window.n_columns - len(ids)
    else:
        embeddings = model.get_input_embeddings()(row)
        cache, inputs = _cache(model, window, []), {"inputs_embeds": torch.cat([given.to(embeddings), embeddings], 1)}
    if next(iter(inputs.values())).shape[1]:
        reader = model.base_model if adapters.is_virtual(model) else model
        reader(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [layer.memory for layer in cache.layers]


def _cache(model: PreTrainedModel, window: _Window, prefix: list[tuple[torch.Tensor, torch.Tensor]]) -> Cache:
    """Memory for the window's lines and columns, in every line of which the prefix already stands."""
    layers = [_Layer(window) for _ in range(model.config.get_text_config().num_hidden_layers)]
    for layer, (keys, values) in zip(layers, prefix, strict=False):
        layer.update(keys.expand(window.n_lines, -1, -1, -1), values.expand(window.n_lines, -1, -1, -1))
    return Cache(layers=layers)
