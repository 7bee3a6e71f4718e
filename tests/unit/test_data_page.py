"""The report on the data: its totals, its pictures, its examples."""

import json
from pathlib import Path
from typing import Any

from stages.lib import chat, data_page, packing, records

PREPARE = {"rows/in": 12, "rows/out": 9, "rejected/no_answer": 2, "rejected/summary/too_long": 1}
SPLIT = {
    "rows/in": 9,
    "rows/train": 5,
    "rows/train/sum": 5,
    "rows/validation": 1,
    "rows/test": 1,
    "duplicates/exact": 1,
    "duplicates/near": 0,
    "duplicates/candidate_pairs": 70,
    "dropped/limit": 1,
}
PACKED = {
    "train/rows/in": 5,
    "train/rows/packed": 4,
    "train/rows/dropped/overlong": 1,
    "train/tokens/in": 100,
    "train/tokens/trained": 30,
    "train/tokens/context": 60,
    "train/tokens/cut": 0,
    "train/tokens/dropped": 10,
    "train/lost_fraction": 0.1,
    "train/packs": 1,
    "train/fill": 0.9,
}
LENGTHS = [{"tokens": 64, "train": 4}, {"tokens": 128, "train": 0}, {"tokens": 200, "train": 1}]


def rendered(**changes: Any) -> str:
    given: dict[str, Any] = {
        "rejected": [{"code": "no_answer", "where": "rows.jsonl:3", "reason": "ends with a question"}],
        "duplicates": [
            {
                "id": "1",
                "kept_id": "2",
                "score": 0.9,
                "reason": "near",
                "source": "",
                "text": "a b",
                "kept_text": "a <b>",
            }
        ],
        "contamination": [{"id": "4", "overlaps": "5", "where": "test", "share": 0.75, "matched": "one two three"}],
        "linked": [{"id": "6", "group": "left", "split": "train", "alone": "test", "with_group": "right"}],
        "lengths": LENGTHS,
        "labels": [
            {"role": "user", "trained": 0, "not_trained": 60},
            {"role": "assistant", "trained": 30, "not_trained": 0},
        ],
        "spoken": {"en": 3, "de": 1},
        "rows": [data_page.Rendered("3" * 64, "sum", "file", [("1 + 1 = ", False), ("2<|im_end|>", True)])],
        "max_tokens": 128,
    }
    return data_page.render(PREPARE, SPLIT, PACKED, **(given | changes))


def test_each_step_accounts_for_the_rows_it_was_given() -> None:
    steps = data_page.flow(PREPARE, SPLIT, PACKED)
    assert [(step.name, step.taken, step.unexplained) for step in steps] == [
        ("prepare", 12, 0),
        ("dedup_split", 9, 0),
        ("tokenize_pack, train", 5, 0),
    ]


def test_noisy_twins_add_to_the_rows_of_the_training_split() -> None:
    steps = data_page.flow(PREPARE, SPLIT | {"rows/noisy": 2, "rows/train": 7}, PACKED)
    assert (steps[1].added, steps[1].unexplained) == (2, 0)


def test_rows_that_nothing_accounts_for_are_shown_as_such() -> None:
    steps = data_page.flow(PREPARE, SPLIT | {"dropped/limit": 0}, PACKED)
    assert steps[1].unexplained == 1
    assert "unexplained" in data_page.render(
        PREPARE,
        SPLIT | {"dropped/limit": 0},
        PACKED,
        rejected=[],
        duplicates=[],
        contamination=[],
        linked=[],
        lengths=LENGTHS,
        labels=[],
        spoken={"en": 1},
        rows=[],
        max_tokens=128,
    )


def test_what_is_learned_is_marked_and_markup_in_the_data_is_text() -> None:
    html = rendered()
    assert "1 + 1 = <mark>2&lt;|im_end|&gt;</mark>" in html
    assert "a &lt;b&gt;" in html
    assert "rows.jsonl:3: ends with a question" in html
    assert "75% of a row of test" in html
    assert "of group left: train with right, alone test" in html
    assert "30% of the training tokens are learned" in html
    assert html == rendered()


def test_bars_of_the_histogram_stand_on_the_axis_and_the_tallest_reaches_the_top() -> None:
    bars = data_page.histogram(LENGTHS)["bars"]
    assert [round(bar["y"] + bar["height"]) for bar in bars] == [190, 190, 190]
    assert bars[0]["height"] == 170
    assert bars[2]["height"] == 42.5


def test_the_first_examples_of_each_kind_are_taken_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    codes = ["a"] * 9 + ["b"] * 2
    path.write_text("".join(json.dumps({"code": code, "n": i}) + "\n" for i, code in enumerate(codes)))
    found = data_page.examples(path, "code")
    assert [row["n"] for row in found] == [0, 1, 2, 3, 4, 9, 10]
    assert data_page.examples(tmp_path / "absent.jsonl") == []


def test_the_sample_is_the_same_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [records.make([], group="", source="", task=str(i)) for i in range(50)]
    for name, ordered in (("there", rows), ("back", rows[::-1])):
        records.write(tmp_path / name, ordered)
    found = data_page.sample(tmp_path / "there", 10)
    assert found.equals(data_page.sample(tmp_path / "back", 10))
    assert found["id"].to_pylist() == sorted(row["id"] for row in rows)[:10]


def test_a_row_is_shown_in_pieces_that_join_to_what_was_packed(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    turns = [{"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}]
    row = records.make([*turns, *turns], group="", source="file", task="sum")
    encoding = chat.encode(tokenizer, row["messages"])
    tokens = packing.Tokens.of([(row["id"], encoding)])
    (shown,) = data_page.rendered(records.table([row]), tokens, tokenizer)
    assert "".join(text for text, _ in shown.pieces) == tokenizer.decode(encoding.input_ids)
    assert [text for text, is_trained in shown.pieces if is_trained] == ["3<|im_end|>"] * 2


def test_languages_are_counted_by_row() -> None:
    texts = [
        "The weather is nice today and we all go outside.",
        "Das Wetter ist heute schön, und wir gehen hinaus.",
        "ok",
    ]
    rows = [records.make(None, kind="text", text=text, group="", source="", task="t") for text in texts]
    assert data_page.languages_of(records.table(rows)) == {"en": 1, "de": 1, "?": 1}
