"""The held-out rows on which a finished model is measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from stages.lib import chat, records
from stages.lib.errors import DataError
from stages.lib.schema.pack import Labels

Row = Mapping[str, Any]


def usable(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Rows whose answer can be asked for and is one to give, and how many cannot be used for which reason."""
    kept, reasons = [], Counter[str]()
    for row in rows:
        try:
            encode(tokenizer, row)
        except chat.UnusableConversation as fault:
            reasons[fault.reason] += 1
        else:
            kept.append(row)
    return kept, reasons


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> chat.Encoded:
    """The tokens of a row.

    Raises: chat.UnusableConversation, with reason `unwanted` for an answer that is not to be learned, or another.
    """
    if row["kind"] == "unpaired" and row["label"] != "true":
        raise chat.UnusableConversation("unwanted", "an answer that is marked as not wanted")
    turns = records.conversation(row)
    if turns is None:
        return chat.encode_text(tokenizer, row["text"])
    return chat.encode(tokenizer, turns, row["tools"], labels=Labels.last_turn)


def conversations(splits: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """Token ids of `count` rows that were not trained on, see `rows`."""
    return [[int(token) for token in encode(tokenizer, row).input_ids] for row in rows(splits, tokenizer, count)]


def rows(splits: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[Row]:
    """`count` usable rows that were not trained on, every task represented, the choice fixed by the ids.

    Raises: DataError, when validation and test hold none.
    """
    found = [row for name in ("test", "validation") for row in records.read(splits / f"{name}.parquet")]
    kept, _ = usable(tokenizer, found)
    if not kept:
        raise DataError(
            f"{splits}: test and validation hold {len(found)} rows, none of which can be used. "
            "Raise split.test_fraction, or give more data."
        )
    return spread(kept, count)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, tasks in turn, within a task by id (a hash, hence as good as drawn).

    tasks a a a b, count 3  ->  a b a
    """
    by_task: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        by_task.setdefault(row["task"], []).append(row)
    turns = sorted(
        ((place, task, row) for task, found in by_task.items() for place, row in enumerate(found)),
        key=lambda turn: turn[:2],
    )
    return [row for _, _, row in turns[:count]]
