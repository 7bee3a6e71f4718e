"""Packs: whole conversations, none lost, none cut, and every token accounted for."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib import chat, packing
from stages.lib.chat import IGNORED, Encoded
from stages.lib.errors import DataError
from stages.lib.schema.pack import OnOverlong
from stages.lib.schema.pack import Pack as Settings


def row(length: int, first: int = 0) -> Encoded:
    """Ids first, first + 1, ...; the last one is the answer."""
    ids = list(range(first, first + length))
    return Encoded(ids, [IGNORED] * (length - 1) + ids[-1:])


def records(*answers: str) -> list[dict[str, Any]]:
    ask = {"role": "user", "content": "the quick brown fox"}
    return [{"id": f"row{i}", "messages": [ask, {"role": "assistant", "content": a}]} for i, a in enumerate(answers)]


def test_each_conversation_goes_where_it_leaves_least_room() -> None:
    rows = {"a": row(3), "b": row(2, 10), "c": row(2, 20), "d": row(1, 30)}
    packs = packing.pack(rows, max_tokens=4)
    assert [pack.row_ids for pack in packs] == [["a", "d"], ["b", "c"]]
    assert packs[0].input_ids == [0, 1, 2, 30]
    assert packs[0].labels == [IGNORED, IGNORED, 2, 30]
    assert packs[0].position_ids == [0, 1, 2, 0]


def test_packs_do_not_depend_on_the_order_of_rows_and_lose_none() -> None:
    rows = {f"{i:03}": row(1 + i * 7 % 50, i * 100) for i in range(200)}
    packs = packing.pack(rows, max_tokens=64)
    assert packs == packing.pack(dict(reversed(rows.items())), max_tokens=64)
    assert sorted(row_id for pack in packs for row_id in pack.row_ids) == sorted(rows)
    assert max(len(pack.input_ids) for pack in packs) <= 64
    for pack in packs:
        assert pack.input_ids == [i for row_id in pack.row_ids for i in rows[row_id].input_ids]


def test_a_pack_comes_apart_into_the_prompts_and_answers_it_was_made_of() -> None:
    (pack,) = packing.pack({"a": row(3), "b": row(2, 10)}, max_tokens=8)
    found = packing.documents(pack)
    assert [(d.row_id, d.prompt, d.answer) for d in found] == [("a", [0, 1], [2]), ("b", [10], [11])]


def test_rows_in_are_rows_packed_and_rows_dropped_and_so_are_tokens(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    rows = records("3", "nothing at all " * 20, "<|im_end|>", "4 5 6")
    found = packing.encode_rows(tokenizer, rows, Settings(max_tokens=64, on_overlong=OnOverlong.drop), split="train")
    packs = packing.pack(found.kept, max_tokens=64)
    counts = packing.account(found, packs, max_tokens=64, split="train")
    assert [(line["id"], line["reason"]) for line in found.dropped] == [("row1", "overlong"), ("row2", "control_token")]
    assert counts["train/rows/in"] == 4
    assert counts["train/rows/packed"] == 2
    assert counts["train/rows/dropped/overlong"] == counts["train/rows/dropped/control_token"] == 1
    parts = sum(counts[f"train/tokens/{part}"] for part in ("trained", "context", "dropped"))
    assert counts["train/tokens/in"] == parts
    assert counts["train/packs"] * 64 == parts - counts["train/tokens/dropped"] + counts["train/tokens/unused_room"]


def test_a_row_that_the_chat_template_refuses_is_dropped_and_counted(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    refusal = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    settings = Settings(max_tokens=64, on_overlong=OnOverlong.drop)
    found = packing.encode_rows(tokenizer, records("3", "no"), settings, split="train")
    assert [(line["id"], line["reason"]) for line in found.dropped] == [("row1", "template")]
    assert list(found.kept) == ["row0"]


def test_an_overlong_row_ends_the_stage_where_dropping_is_not_allowed(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    settings = Settings(max_tokens=8, on_overlong=OnOverlong.error)
    with pytest.raises(
        DataError, match=r"row row0: conversation of \d+ tokens, a pack holds 8\. Raise pack\.max_tokens"
    ):
        packing.encode_rows(tokenizer, records("3"), settings, split="train")


def test_a_split_with_nothing_to_train_on_is_an_error(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    settings = Settings(max_tokens=8, on_overlong=OnOverlong.drop)
    with pytest.raises(DataError, match=r"validation\.parquet: none of 2 rows.*'overlong': 2.*pack\.max_tokens"):
        packing.encode_rows(tokenizer, records("3", "4"), settings, split="validation")


def test_the_histogram_counts_every_row_once() -> None:
    lines = packing.length_histogram({"train": [1, 32, 33, 500, 900], "validation": [512]}, max_tokens=512)
    assert [line["tokens"] for line in lines[:2]] == [32, 64]
    assert lines[0]["train"] == 2
    assert lines[-1] == {"tokens": 900, "train": 1, "validation": 0}
    assert sum(line["train"] for line in lines) == 5
    assert sum(line["validation"] for line in lines) == 1


def test_a_missing_folder_of_packs_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"packs\.parquet: found no packs.*tokenize_pack"):
        packing.read(tmp_path)
