"""Prompts with solved examples in front: what a user gets from the base model without any training."""

import hashlib
import heapq
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib import records
from stages.lib.errors import DataError
from stages.lib.schema.split import task_in_train

Row = Mapping[str, Any]


def choose(train: Path, tasks: Collection[str], *, n: int, seed: int) -> dict[str, list[Row]]:
    """Choose the n examples of each task, the same for all its prompts.

    The order is by a hash of seed and row id, so it looks random, needs no random state, and changes little when
    rows are added. The file is read batch by batch: a million rows cost no more memory than one batch. A task out of
    distribution is shown examples of the task it belongs to.

    Args: train: Parquet file of records.
    Raises: DataError, when train holds fewer than n rows of a task.
    """
    best: dict[str, list[tuple[bytes, Row]]] = {task_in_train(task): [] for task in tasks}
    for batch in records.batches(train):
        ids, found = batch["id"].to_pylist(), batch["task"].to_pylist()
        for task, chosen in best.items():
            places = {_place(id, seed): row for row, id in enumerate(ids) if found[row] == task}
            first = sorted(heapq.nsmallest(n, places))
            rows = records.rows(batch.take([places[place] for place in first]))
            best[task] = sorted([*chosen, *zip(first, rows, strict=True)], key=lambda each: each[0])[:n]
    for task, chosen in best.items():
        if len(chosen) < n:
            raise DataError(
                f"{train}: {len(chosen)} rows of task {task!r}, expected at least {n} to show as examples. "
                "Lower evaluate.fewshot, or give split.max_rows.train more rows of the task."
            )
    return {task: [row for _, row in best[task_in_train(task)]] for task in tasks}


def _place(id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()


def conversation(examples: Sequence[Row], question: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The turns of the examples in front of those of the question; a system turn stays first and stands once.

    [system, user], examples [system, user, assistant] each  ->  system, user, assistant, user, assistant, ..., user
    """
    system = [turn for turn in question if turn["role"] == "system"]
    shown = [turn for example in examples for turn in records.conversation(example) or () if turn["role"] != "system"]
    return [*system, *shown, *(turn for turn in question if turn["role"] != "system")]
