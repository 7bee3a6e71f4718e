"""What a runtime makes of chats, held to what training makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages.lib import chat, records
from stages.lib.errors import GateError
from stages.lib.export import round_trip
from stages.lib.export.formats.exporter import Session


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> round_trip.Expected:
    splits = tmp_path_factory.mktemp("splits")
    for name in ("train", "test"):
        turns = [{"role": "user", "content": f"{name} {{i}}"}, {"role": "assistant", "content": "yes"}]
        rows = [
            records.make(
                [turn | {"content": turn["content"].format(i=i)} for turn in turns],
                group=f"{name}{i}",
                source="tests",
                task="a",
            )
            for i in range(4)
        ]
        records.write(splits / f"{name}.parquet", rows)
    return round_trip.expected(splits, chat.load_tokenizer(tiny_model_dir), [2], 5)


def session(e: round_trip.Expected) -> Session:
    return Session(list(e.rendered), [list(ids) for ids in e.tokens], [], 1.0)


def test_the_chats_are_of_all_splits_and_as_many_as_asked_beside_the_hard_ones(expected: round_trip.Expected) -> None:
    data = [turns[0]["content"] for turns in expected.chats[-5:]]
    assert sorted(text.split()[0] for text in data) == ["test", "test", "test", "train", "train"]
    assert len(expected.chats) == len(round_trip.HARD) + 1 + 5
    assert expected.parsed == 1  # the one that spells out <|im_end|>


def test_a_runtime_that_does_as_training_did_passes(expected: round_trip.Expected) -> None:
    counts = round_trip.check_session("m.gguf", session(expected), expected)
    assert counts == {
        "chats": len(expected.chats),
        "bos": 4,
        "control_text": 1,
    }


def test_another_rendering_breaks_the_gate_at_its_first_character(expected: round_trip.Expected) -> None:
    told = session(expected)
    told.rendered[1] = told.rendered[1].replace("  spaces", " spaces")
    with pytest.raises(
        GateError, match=r"m.gguf: its runtime writes chat 2 of \d+ .* from character \d+: found 'spaces"
    ):
        round_trip.check_session("m.gguf", told, expected)


def test_other_tokens_break_the_gate_at_the_first_of_them(expected: round_trip.Expected) -> None:
    told = session(expected)
    told.tokens[0][3] = 7
    with pytest.raises(GateError, match=r"writes chat 1 of .* from token 3: found .* expected .*gguf_pre_tokenizer"):
        round_trip.check_session("m.gguf", told, expected)


def test_a_second_bos_breaks_the_gate_and_is_named(expected: round_trip.Expected) -> None:
    told = session(expected)
    told.tokens[0].insert(0, expected.tokenizer.bos_token_id)
    with pytest.raises(GateError, match=r"\(5 BOS tokens, expected 4\)"):
        round_trip.check_session("m.gguf", told, expected)


def test_a_runtime_may_leave_the_bos_to_its_tokenizer(expected: round_trip.Expected) -> None:
    shorter = [text.removeprefix(expected.tokenizer.bos_token) for text in expected.rendered]
    assert shorter != expected.rendered
    round_trip.check_session("m.gguf", replace(session(expected), rendered=shorter), expected)
