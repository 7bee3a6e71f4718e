"""Prompts with solved examples in front: what a user gets from the base model without any training."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from stages.lib.errors import DataError

Row = Mapping[str, Any]


def choose(train: Sequence[Row], task: str, *, n: int, seed: int) -> list[Row]:
    """Choose the n examples of a task, the same for all its prompts.

    The order is by a hash of seed and row id, so it looks random, needs no random state, and changes little when
    rows are added.

    Raises: DataError, when train holds fewer than n rows of the task.
    """
    rows = [row for row in train if row["task"] == task]
    if len(rows) < n:
        raise DataError(
            f"data/splits/train.parquet: {len(rows)} rows of task {task!r}, expected at least {n} to show as examples. "
            "Lower evaluate.fewshot, or give split.max_rows.train more rows of the task."
        )
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())[:n]


def conversation(examples: Sequence[Row], question: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The turns of the examples in front of those of the question; a system turn stays first and stands once.

    [system, user], examples [system, user, assistant] each  ->  system, user, assistant, user, assistant, ..., user
    """
    system = [turn for turn in question if turn["role"] == "system"]
    shown = [turn for example in examples for turn in example["messages"] if turn["role"] != "system"]
    return [*system, *shown, *(turn for turn in question if turn["role"] != "system")]
