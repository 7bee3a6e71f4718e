"""The held-out conversations on which a finished model is measured, as token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from stages.lib import chat, files
from stages.lib.errors import DataError


def conversations(splits: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """Token ids of `count` conversations that were not trained on, every task represented, the choice fixed by the ids.

    Raises: DataError, when validation and test are empty.
    """
    rows = [row for name in ("test", "validation") for row in files.read_rows(splits / f"{name}.parquet")]
    if not rows:
        raise DataError(f"{splits}: test and validation hold no rows. Raise split.test_fraction, or give more data.")
    return [chat.encode(tokenizer, row["messages"]).input_ids for row in spread(rows, count)]


def spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` rows, tasks in turn, within a task by id (a hash, hence as good as drawn).

    tasks a a a b, count 3  ->  a b a
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        by_task.setdefault(row["task"], []).append(row)
    turns = sorted(
        ((place, task, row) for task, found in by_task.items() for place, row in enumerate(found)),
        key=lambda turn: turn[:2],
    )
    return [row for _, _, row in turns[:count]]
