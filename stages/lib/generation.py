"""Greedy decoding in batches: the most likely token, again and again, until the model ends its turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stages.lib import prefill

CROWD = 0.75  # rows that have ended leave the batch once this share or less goes on: each leaving copies the cache


@dataclass(frozen=True)
class Generated:
    """New token ids of one row, without the stop token; stopped says whether the model ended its turn by itself."""

    ids: list[int]
    stopped: bool


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[Generated]:
    """Continue each prompt with its most likely tokens, in the order of the prompts.

    Args: prompts: T_i token ids each, at least one. max_new_tokens: limit per row, the stop token not counted.
    """
    found: dict[int, Generated] = {}
    for read in prefill.in_batches(model, prompts, room=max_new_tokens, batch_size=batch_size):
        found |= zip(read.rows, after(read, stop_ids=stop_ids, max_new_tokens=max_new_tokens), strict=True)
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
def after(read: prefill.Read, *, stop_ids: Collection[int], max_new_tokens: int) -> list[Generated]:
    """Continue a batch of prompts that were read. This uses the batch up: lines leave it as they end."""
    written: list[list[int]] = [[] for _ in read.rows]
    stopped = [False] * len(read.rows)
    ended: set[int] = set()
    present = list(range(len(read.rows)))  # which row each line of the batch holds
    positions = read.next_positions()
    tokens = read.logits.argmax(dim=-1)  # (B,)
    while True:
        for row, token in zip(present, tokens.tolist(), strict=True):
            if row in ended:
                continue
            if token in stop_ids:
                stopped[row] = True
                ended.add(row)
            elif len(written[row]) == max_new_tokens:
                ended.add(row)
            else:
                written[row].append(token)
        going_on = [line for line, row in enumerate(present) if row not in ended]
        if not going_on:
            return [Generated(ids, by_itself) for ids, by_itself in zip(written, stopped, strict=True)]
        if len(going_on) <= CROWD * len(present):
            read.keep_lines(going_on)
            tokens, positions = tokens[going_on], positions[going_on]
            present = [present[line] for line in going_on]
        read.mask = torch.cat([read.mask, read.mask.new_ones(len(present), 1)], dim=1)
        logits = read.forward(slice(None), tokens[:, None], read.mask, positions[:, None], keep=1)
        tokens = logits[:, -1].argmax(dim=-1)
        positions = positions + 1
