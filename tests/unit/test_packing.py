"""Packs: whole sequences, cut only as the policy says, and every token accounted for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lib import chat, packing, records
from stages.lib.chat import IGNORED, Encoded
from stages.lib.errors import DataError, GateError
from stages.lib.packing import Tokens
from stages.lib.schema.pack import ControlTokens, Labels, OnOverlong
from stages.lib.schema.pack import Pack as Settings

DROP = Settings(64, OnOverlong.drop, Labels.assistant_only, ControlTokens.text, max_lost_fraction=1.0)
BOS, USER, ASSISTANT = 99, chat.ROLES.index("user"), chat.ROLES.index("assistant")


def encoded(drawn: str, first: int = 0) -> Encoded:
    """Ids first, first + 1, ...; `.` is context, `a` an answer, `B` the BOS."""
    ids = np.arange(first, first + len(drawn), dtype=np.int32)
    ids[[letter == "B" for letter in drawn]] = BOS
    is_answer = np.array([letter == "a" for letter in drawn])
    roles = np.where(is_answer, ASSISTANT, USER).astype(np.int8)
    return Encoded(ids, np.where(is_answer, ids, np.int32(IGNORED)), roles)


def row(length: int, first: int = 0) -> Encoded:
    return encoded("." * (length - 1) + "a", first)


def packed(rows: dict[str, Encoded], *, max_tokens: int) -> list[packing.Pack]:
    tables = packing.packs(Tokens.of(list(rows.items())), max_tokens=max_tokens)
    return [pack for table in tables for pack in packing.packs_of(table)]


def chats(*answers: str) -> list[dict[str, Any]]:
    ask = {"role": "user", "content": "the quick brown fox"}
    turns = [[ask, {"role": "assistant", "content": answer}] for answer in answers]
    return [
        records.make(messages, group="", source="", task="t") | {"id": f"row{i}"} for i, messages in enumerate(turns)
    ]


def sorted_out(rows: Sequence[dict[str, Any]], folder: Path, p: Settings) -> packing.Batch:
    return packing.encoded(records.table(rows), folder=folder, p=p, where="data/splits/train.parquet")


def accounted(batch: packing.Batch, p: Settings, tmp_path: Path) -> dict[str, float]:
    with packing.collected([batch], tmp_path) as found:
        packing.check(found, p, where="data/splits/train.parquet")
        n_packs = sum(len(table) for table in packing.packs(found.tokens, max_tokens=p.max_tokens))
        return packing.account(found, n_packs, max_tokens=p.max_tokens, split="train")


def test_each_conversation_goes_where_it_leaves_least_room() -> None:
    packs = packed({"a": row(3), "b": row(2, 10), "c": row(2, 20), "d": row(1, 30)}, max_tokens=4)
    assert [pack.row_ids for pack in packs] == [["a", "d"], ["b", "c"]]
    assert packs[0].input_ids == [0, 1, 2, 30]
    assert packs[0].labels == [IGNORED, IGNORED, 2, 30]
    assert packs[0].position_ids == [0, 1, 2, 0]


def test_best_fit_is_what_looking_at_every_pack_finds() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 65, 500))[::-1]
    room: list[int] = []
    expected = []
    for length in lengths.tolist():
        fitting = [(left, pack) for pack, left in enumerate(room) if left >= length]
        pack = min(fitting)[1] if fitting else len(room)
        room += [64] * (pack == len(room))
        room[pack] -= length
        expected.append(pack)
    assert packing.best_fit(lengths, max_tokens=64).tolist() == expected


def test_packs_do_not_depend_on_the_order_of_rows_and_lose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {f"{i:03}": row(1 + i * 7 % 50, i * 100) for i in range(200)}
    packs = packed(rows, max_tokens=64)
    monkeypatch.setattr(packing, "GROUP_TOKENS", 64 * 7)  # row groups of 7 packs
    assert packs == packed(dict(reversed(rows.items())), max_tokens=64)
    assert sorted(row_id for pack in packs for row_id in pack.row_ids) == sorted(rows)
    assert max(len(pack.input_ids) for pack in packs) <= 64
    for pack in packs:
        assert pack.input_ids == [i for row_id in pack.row_ids for i in rows[row_id].input_ids]


def test_a_usual_mix_of_lengths_fills_packs_by_98_percent() -> None:
    drawn = np.exp(np.random.default_rng(0).normal(4.8, 0.7, 5000)).astype(np.int64)
    lengths = np.sort(drawn.clip(8, 512))[::-1]
    packs = packing.best_fit(lengths, max_tokens=512)
    assert lengths.sum() / (512 * (packs.max() + 1)) > 0.98


def test_a_pack_comes_apart_into_the_prompts_and_answers_it_was_made_of() -> None:
    (pack,) = packed({"a": row(3), "b": row(2, 10)}, max_tokens=8)
    found = packing.documents(pack)
    assert [(d.row_id, d.prompt, d.answer) for d in found] == [("a", [0, 1], [2]), ("b", [10], [11])]


@pytest.mark.parametrize("policy", [policy for policy in OnOverlong if policy is not OnOverlong.error])
def test_rows_and_tokens_in_are_those_packed_cut_and_dropped(
    policy: OnOverlong, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [
        *chats("3", "nothing at all " * 20, "4 5 6"),
        records.make([*turns(), *turns()] * 2, group="", source="", task="t"),
        records.make(turns(), kind="unpaired", label="false", group="", source="", task="t"),
    ]
    p = replace(DROP, on_overlong=policy)
    counts = accounted(sorted_out(rows, tiny_model_dir, p), p, tmp_path)
    dropped = sum(n for name, n in counts.items() if name.startswith("train/rows/dropped/"))
    assert counts["train/rows/in"] == len(rows) == counts["train/rows/packed"] + dropped
    assert counts["train/rows/dropped/unwanted"] == 1
    parts = {part: counts[f"train/tokens/{part}"] for part in ("trained", "context", "cut", "dropped")}
    assert counts["train/tokens/in"] == sum(parts.values())
    assert counts["train/packs"] * 64 == parts["trained"] + parts["context"] + counts["train/tokens/unused_room"]
    assert 0 < counts["train/lost_fraction"] < 1
    for kind, total in (("tokens", parts["trained"] + parts["context"]), ("trained", parts["trained"])):
        assert sum(n for name, n in counts.items() if name.startswith(f"train/{kind}/role/")) == total


def turns() -> list[dict[str, str]]:
    return [{"role": "user", "content": "add 1 2 3"}, {"role": "assistant", "content": "over the lazy dog"}]


def test_a_row_that_the_chat_template_refuses_is_dropped_counted_and_lost(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model_dir, tmp_path)
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    found = sorted_out(chats("3", "no"), folder, DROP)
    assert [(line["id"], line["reason"]) for line in found.dropped] == [("row1", "template")]
    assert found.tokens.row_ids.to_pylist() == ["row0"]
    assert found.counts["lost"] == found.dropped[0]["lost"] > 0


def copied(folder: Path, to: Path) -> Path:
    """The tokenizer alone."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_an_overlong_row_ends_the_stage_where_dropping_is_not_allowed(tiny_model_dir: Path) -> None:
    with pytest.raises(
        DataError, match=r"train\.parquet: row row0: conversation of \d+ tokens, a pack holds 8\. Raise pack\.max_tok"
    ):
        sorted_out(chats("3"), tiny_model_dir, replace(DROP, max_tokens=8, on_overlong=OnOverlong.error))


def test_a_split_with_nothing_to_train_on_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    p = replace(DROP, max_tokens=8)
    with pytest.raises(DataError, match=r"train\.parquet: none of 2 rows.*'overlong': 2.*pack\.max_tokens"):
        accounted(sorted_out(chats("3", "4"), tiny_model_dir, p), p, tmp_path)


def test_more_lost_than_allowed_is_an_error_that_names_key_and_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    p = replace(DROP, max_lost_fraction=0.1)
    with pytest.raises(DataError, match=r"expected at most 10\.0%.*row1 \(\d+ lost, overlong\).*pack\.max_lost_frac"):
        accounted(sorted_out(chats("3", "nothing at all " * 20), tiny_model_dir, p), p, tmp_path)


@pytest.mark.parametrize(
    ("drawn", "left"),
    [
        ("........aa.", ".....aa."),  # the prompt loses its beginning
        ("B.......aa.", "B....aa."),  # not its BOS
        (".aaaaaa.aa.", ".....aa."),  # what is left of an earlier answer is context
        ("....aaaaaaa", ".aaaaaaa"),
        ("...aaaaaaaa", None),  # an answer without anything before it
    ],
)
def test_the_end_of_the_prompt_is_kept_and_the_whole_answer(drawn: str, left: str | None) -> None:
    found = packing.keep_end_of_prompt(encoded(drawn), BOS, replace(DROP, max_tokens=8))
    if left is None:
        assert found is None
        return
    assert found is not None
    assert [label != IGNORED for label in found.labels] == [letter == "a" for letter in left]
    assert found.input_ids.tolist()[-5:] == list(range(len(drawn) - 5, len(drawn)))
    assert (found.input_ids[0] == BOS) == (left[0] == "B")


def test_a_conversation_is_split_at_its_turns_and_keeps_its_system_turn(tiny_model_dir: Path) -> None:
    system = {"role": "system", "content": "the lazy dog"}
    row = records.make([system, *turns() * 5], group="", source="", task="t") | {"id": "long"}
    alone = chat.encode(chat.load_tokenizer(tiny_model_dir), [system, *turns() * 2])
    p = replace(DROP, on_overlong=OnOverlong.split_turns, max_tokens=len(alone.input_ids))
    found = sorted_out([row], tiny_model_dir, p)
    assert found.tokens.row_ids.to_pylist() == ["long", "long#2", "long#3"]
    for start in found.tokens.offsets[:2]:
        assert found.tokens.ids[start : start + p.max_tokens].tolist() == list(alone.input_ids)
    assert found.counts["rows/cut"] == 1
    assert found.counts["lost"] == 0


def test_a_text_is_cut_into_pieces_and_loses_nothing_but_a_last_token_alone(tiny_model_dir: Path) -> None:
    p = replace(DROP, max_tokens=8)
    for n_left, pieces in ((2, 3), (1, 2)):
        row = records.make(None, kind="text", text="x", group="", source="", task="t") | {"id": "text"}
        found = packing._Sorting(chat.load_tokenizer(tiny_model_dir), p, "")
        ids = np.arange(16 + n_left, dtype=np.int32)
        found.add(row, Encoded(ids, ids, np.full(len(ids), chat.ROLES.index("text"), np.int8)))
        tokens = packing.Tokens.of(found.kept)
        assert tokens.row_ids.to_pylist() == ["text", "text#2", "text#3"][:pieces]
        assert tokens.ids.tolist() == list(range(16 + n_left * (n_left > 1)))
        assert tokens.per_row(tokens.trained).tolist() == [7, 7, 1][:pieces]  # nothing predicts a first token
        assert found.counts["tokens/cut"] == found.counts["lost"] == (n_left == 1)


def test_the_start_is_kept_and_lost_answers_are_counted(tiny_model_dir: Path) -> None:
    p = replace(DROP, on_overlong=OnOverlong.keep_start)
    found = sorted_out(chats("nothing at all " * 20), tiny_model_dir, p)
    (line,) = found.cut
    assert len(found.tokens.ids) == 64
    assert (line["tokens"], line["lost"]) == (found.lengths[0] - 64, found.lengths[0] - 64 - 1)  # "\n" was not learned


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"trained": slice(None)}, "nothing is learned"),
        ({"trained": slice(-2, None)}, "not learned up to its end"),
        ({"ids": slice(0, 2)}, "second BOS"),
    ],
)
def test_labels_that_break_a_rule_are_found(change: dict[str, slice], rule: str, tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    encoding = chat.encode(tokenizer, turns())
    tokens = Tokens.of([("good", encoding), ("bad", encoding)])
    packing.audit(tokens, np.tile(encoding.roles, 2), tokenizer, DROP, unfinished=[])
    last = len(encoding.input_ids)
    if "trained" in change:
        tokens.trained[last:][change["trained"]] = False
    else:
        tokens.ids[last:][change["ids"]] = tokenizer.bos_token_id
    with pytest.raises(GateError, match=f"row bad: .*{rule}"):
        packing.audit(tokens, np.tile(encoding.roles, 2), tokenizer, DROP, unfinished=[])


def test_the_histogram_counts_every_row_once() -> None:
    lengths = {"train": np.array([1, 32, 33, 500, 900]), "validation": np.array([512])}
    lines = packing.length_histogram(lengths, max_tokens=512)
    assert [line["tokens"] for line in lines[:2]] == [32, 64]
    assert lines[0]["train"] == 2
    assert lines[-1] == {"tokens": 900, "train": 1, "validation": 0}
    assert sum(line["train"] for line in lines) == 5
    assert sum(line["validation"] for line in lines) == 1


def test_a_missing_folder_of_packs_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"packs\.parquet: found no packs.*tokenize_pack"):
        packing.read(tmp_path)
