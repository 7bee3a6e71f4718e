"""Whole conversations into training sequences of bounded length, each token accounted for. Needs no torch."""

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from stages.lib import chat, files
from stages.lib.chat import IGNORED, Encoded
from stages.lib.errors import DataError
from stages.lib.schema import pack as schema

IDS = pa.list_(pa.int32())
PACK = pa.schema([("input_ids", IDS), ("labels", IDS), ("position_ids", IDS), ("row_ids", pa.list_(pa.string()))])
"""Columns of data/packed/<split>/packs.parquet. A pack holds no padding: its lists end with its last conversation."""


@dataclass(frozen=True)
class Pack:
    """Conversations one after the other; a position of 0 begins each, and attention never crosses it.

    rows [a a a] [b b]  ->  input_ids [a a a b b]  position_ids [0 1 2 0 1]
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)

    def add(self, row_id: str, row: Encoded) -> None:
        self.input_ids.extend(row.input_ids)
        self.labels.extend(row.labels)
        self.position_ids.extend(range(len(row.input_ids)))
        self.row_ids.append(row_id)


@dataclass(frozen=True)
class SortedOut:
    """The conversations of one split: those to pack, by row id, and those that cannot be, with the reason."""

    kept: dict[str, Encoded]
    dropped: list[dict[str, Any]]
    lengths: list[int]  # tokens of every conversation that could be encoded, overlong ones too


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], p: schema.Pack, *, split: str
) -> SortedOut:
    """Encode the records of a split. No conversation is cut: an overlong one is dropped whole, or ends the stage.

    Raises: DataError, when nothing is left, or a row is overlong and pack.on_overlong is `error`.
    """
    found = SortedOut({}, [], [])
    for row in rows:
        try:
            encoded = chat.encode(tokenizer, row["messages"])
        except chat.UnusableConversation as fault:
            found.dropped.append({"id": row["id"], "reason": fault.reason, "tokens": None, "message": str(fault)})
            continue
        length = len(encoded.input_ids)
        found.lengths.append(length)
        if length <= p.max_tokens:
            found.kept[row["id"]] = encoded
            continue
        message = f"conversation of {length} tokens, a pack holds {p.max_tokens}"
        if p.on_overlong is schema.OnOverlong.error:
            raise DataError(
                f"data/splits/{split}.parquet: row {row['id']}: {message}. "
                "Raise pack.max_tokens or set pack.on_overlong=drop."
            )
        found.dropped.append({"id": row["id"], "reason": "overlong", "tokens": length, "message": message})
    if not found.kept:
        reasons = dict(Counter(row["reason"] for row in found.dropped))
        raise DataError(
            f"data/splits/{split}.parquet: none of {len(rows)} rows can be trained on (dropped: {reasons}), "
            "expected at least one. Raise pack.max_tokens, or give more rows (data.*, split.*)."
        )
    return found


def account(found: SortedOut, packs: Sequence[Pack], *, max_tokens: int, split: str) -> dict[str, float]:
    """Where every row and token of a split went: in = trained + context + dropped."""
    overlong = [row["tokens"] for row in found.dropped if row["reason"] == "overlong"]
    packed = sum(len(pack.input_ids) for pack in packs)
    trained = sum(trained_tokens(pack.labels) for pack in packs)
    assert sum(found.lengths) == packed + sum(overlong)
    assert sum(len(pack.row_ids) for pack in packs) == len(found.kept)
    return {
        f"{split}/rows/in": len(found.kept) + len(found.dropped),
        f"{split}/rows/packed": len(found.kept),
        **{f"{split}/rows/dropped/{code}": n for code, n in Counter(r["reason"] for r in found.dropped).items()},
        f"{split}/tokens/in": sum(found.lengths),
        f"{split}/tokens/trained": trained,
        f"{split}/tokens/context": packed - trained,
        f"{split}/tokens/dropped": sum(overlong),
        f"{split}/tokens/unused_room": len(packs) * max_tokens - packed,
        f"{split}/packs": len(packs),
    }


def pack(rows: dict[str, Encoded], *, max_tokens: int) -> list[Pack]:
    """Place each conversation where it leaves least room, longest first (best-fit decreasing, arXiv:2404.10830).

        lengths 3 2 2 1, max_tokens 4  ->  [3 1] [2 2]

    Args: rows: by id; none longer than max_tokens.
    Returns: packs in the order they were begun; the same for any order of `rows`.
    """
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row_id, row in sorted(rows.items(), key=lambda item: (-len(item[1].input_ids), item[0])):
        length = len(row.input_ids)
        assert length <= max_tokens
        fit = bisect.bisect_left(room, (length, 0))
        if fit == len(room):
            packs.append(Pack())
            left, chosen = max_tokens, len(packs) - 1
        else:
            left, chosen = room.pop(fit)
        packs[chosen].add(row_id, row)
        bisect.insort(room, (left - length, chosen))
    return packs


@dataclass(frozen=True)
class Document:
    """One conversation of a pack, up to its first answer: what the model is asked, and what it should say."""

    row_id: str
    prompt: list[int]
    answer: list[int]


def documents(pack: Pack) -> list[Document]:
    """Take a pack apart again."""
    found, start = [], 0
    for row_id, length in zip(pack.row_ids, document_lengths(pack.position_ids), strict=True):
        ids, labels = pack.input_ids[start : start + length], pack.labels[start : start + length]
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        last = next((i for i in range(first, length) if labels[i] == IGNORED), length)
        found.append(Document(row_id, ids[:first], ids[first:last]))
        start += length
    return found


def read(folder: Path) -> list[Pack]:
    """The packs of one split.

    Raises: DataError, when the folder holds none.
    """
    path = folder / "packs.parquet"
    rows = files.read_rows(path) if path.is_file() else []
    if not rows:
        raise DataError(f"{path}: found no packs, expected at least one. Run the stage tokenize_pack.")
    return [Pack(**row) for row in rows]


def document_lengths(position_ids: Sequence[int]) -> list[int]:
    """Lengths of the conversations in a sequence: [0 1 2 0 1] -> [3 2]."""
    starts = [i for i, position in enumerate(position_ids) if position == 0] + [len(position_ids)]
    return [end - start for start, end in itertools.pairwise(starts)]


def trained_tokens(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels)


def length_histogram(lengths: dict[str, list[int]], *, max_tokens: int, bins: int = 16) -> list[dict[str, int]]:
    """Rows by length, one column per split. The last line counts what no pack can hold.

    Returns: lines {"tokens": upper edge, split: rows with at most that many tokens and more than the line before}.
    """
    width = -(-max_tokens // bins)
    edges = [min(width * (i + 1), max_tokens) for i in range(-(-max_tokens // width))]
    longest = max((length for split in lengths.values() for length in split), default=0)
    edges.append(max(longest, max_tokens + 1))
    lines = []
    for low, high in itertools.pairwise([0, *edges]):
        counts = {split: sum(low < length <= high for length in found) for split, found in sorted(lengths.items())}
        lines.append({"tokens": high, **counts})
    return lines
