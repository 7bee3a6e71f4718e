"""Contamination: what is held out is found in training, in whatever dress, and templates are not."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.lib import contamination, records
from stages.lib.errors import DataError
from stages.lib.schema.dedup import Contamination

POEM = "two roads diverged in a yellow wood and sorry I could not travel both and be one traveler long I stood"


def row(ask: str, say: str, task: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": POEM}, {"role": "user", "content": ask}]
    return records.make([*turns, {"role": "assistant", "content": say}], group="", source="file", task=task)


def batch(*turns: tuple[str, str], task: str = "chat") -> pa.RecordBatch:
    return records.table([row(*turn, task) for turn in turns]).to_batches()[0]


def numbered(words: int, first: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(first, first + words))


@pytest.fixture
def settings(tmp_path: Path) -> Contamination:
    (tmp_path / "benchmarks").mkdir()
    return Contamination(ngram_words=4, min_overlap=0.6, benchmarks=str(tmp_path / "benchmarks"))


def ids(rows: pa.RecordBatch) -> list[str]:
    return [str(id) for id in rows["id"].to_pylist()]


def test_a_test_row_in_a_longer_training_row_is_found_whatever_its_case_and_punctuation(
    settings: Contamination,
) -> None:
    test = batch(("Who wrote the tale of the whale?", "Herman Melville."), ("something else that nobody has", "no"))
    train = batch(
        ("A quiz. who WROTE the tale... of the whale; what year", "Well: Herman Melville, in 1851."),
        ("Who wrote the tale of two cities?", "Charles Dickens."),
    )
    [hit] = contamination.hits([train], [("test", test)], settings, 0.5)
    # of the whole row "of the whale herman" is missing; the question is there, all four runs of four words
    assert (hit.id, hit.overlaps, hit.where, hit.share) == (ids(train)[0], ids(test)[0], "test", 1.0)
    assert hit.matched == "Who wrote the tale"


def test_the_share_is_of_the_held_out_row_not_of_the_training_row(settings: Contamination) -> None:
    test = batch((numbered(13), "yes"))  # 10 runs in the question
    inside, most, half = numbered(200), numbered(9) + " x " + numbered(20, first=50), numbered(8)
    train = batch((inside, "a"), (most, "b"), (half, "c"))
    hits = contamination.hits([train], [("test", test)], settings, 0.9)
    assert {hit.id: round(hit.share, 3) for hit in hits} == {ids(train)[0]: 1.0, ids(train)[1]: 0.6}


def test_what_has_few_ngrams_must_be_there_completely(settings: Contamination) -> None:
    test = batch((numbered(6), "so"))  # 3 runs in the question
    train = batch((numbered(6) + " and more", "a"), (numbered(5), "b"))
    assert [hit.id for hit in contamination.hits([train], [("test", test)], settings, 0.9)] == ids(train)[:1]


def test_an_answer_counts_with_its_question(settings: Contamination) -> None:
    test = batch(("why", numbered(20)))
    train = batch(("tell me", "so " + numbered(20)), ("why", "no " + numbered(5)))
    [hit] = contamination.hits([train], [("test", test)], settings, 0.9)
    assert (hit.id, hit.share) == (ids(train)[0], round(17 / 18, 16))


def test_wording_that_many_held_out_rows_or_most_training_rows_have_does_not_count(settings: Contamination) -> None:
    frame = numbered(30, first=100)
    test = batch(*((f"{frame} {word}", "yes") for word in ("red", "green", "blue", "black", "white", "brown")))
    train = batch(*((f"{frame} {number}", "no") for number in range(12)))
    assert contamination.hits([train], [("test", test)], settings, 1.0) == []
    assert len(contamination.hits([train], [("test", test.slice(0, 5))], settings, 1.0)) == 12
    assert contamination.hits([train], [("test", test.slice(0, 5))], settings, 0.5) == []


def test_a_template_neither_hides_a_copy_nor_makes_one(settings: Contamination) -> None:
    frame = "name the class of this text"
    test = batch(*((f"{frame} {numbered(4, first=10 * number)}", "yes") for number in range(12)))
    train = batch((f"{frame} hello {numbered(4)} bye", "no"), (f"{frame} w0 w1 something else", "no"))
    assert [hit.id for hit in contamination.hits([train], [("test", test)], settings, 0.5)] == ids(train)[:1]


def test_rows_of_fewer_words_than_an_ngram_are_compared_as_a_whole(settings: Contamination) -> None:
    test = batch(("Hi!", "Hello"))
    train = batch(("hi", "hello!"), ("hi", "hello, what can I do for you"))
    [hit] = contamination.hits([train], [("test", test)], settings, 1.0)
    assert (hit.id, hit.matched) == (ids(train)[0], "Hi! Hello")


def test_the_closest_row_of_each_place_is_listed_by_training_row(settings: Contamination) -> None:
    test = batch((numbered(20), "yes"), (numbered(16) + " else", "no"))
    validation = batch((numbered(10), "so"))
    train = batch((numbered(20), "other"))
    hits = contamination.hits([train], [("test", test), ("validation", validation)], settings, 1.0)
    assert [(hit.overlaps, hit.where) for hit in hits] == [
        (ids(test)[0], "test"),
        (ids(validation)[0], "validation"),
    ]


def test_hits_do_not_depend_on_how_the_rows_are_cut_into_batches(settings: Contamination) -> None:
    test = batch(*((numbered(12, first=10 * number), "yes") for number in range(20)))
    train = batch(*((numbered(30, first=5 * number), "no") for number in range(40)))
    whole = contamination.hits([train], [("test", test)], settings, 0.5)
    pieces = [train.slice(begin, 7) for begin in range(35, -1, -7)]
    halves = [("test", test.slice(10)), ("test", test.slice(0, 10))]
    assert len(whole) > 20
    assert contamination.hits(pieces, halves, settings, 0.5) == whole


def test_a_preference_is_found_by_its_prompt_and_a_text_by_itself(settings: Contamination) -> None:
    turn = [{"role": "assistant", "content": "short"}]
    ask = [{"role": "user", "content": numbered(9)}]
    rows = [
        records.make(ask, kind="preference", chosen=turn, rejected=turn, group="", source="file", task="preference"),
        records.make(None, kind="text", text=numbered(9, first=50), group="", source="file", task="text"),
    ]
    train = batch(("so " + numbered(9), "a"), (numbered(20, first=45), "b"))
    hits = contamination.hits([train], [("test", records.table(rows).to_batches()[0])], settings, 1.0)
    assert {hit.id: hit.overlaps for hit in hits} == {id: row["id"] for id, row in zip(ids(train), rows, strict=True)}


def test_every_field_of_a_benchmark_is_looked_for_in_any_kind_of_file(settings: Contamination) -> None:
    folder = Path(settings.benchmarks)
    (folder / "README.md").write_text(numbered(9, first=400))
    fields = {"question": numbered(9), "choices": ["red", numbered(9, first=100)], "answer": 1}
    (folder / "a.jsonl").write_text('{"question": "none of it"}\n' + json.dumps(fields) + "\n")
    (folder / "b.csv").write_text(f"id,text\n1,{numbered(9, first=200)}\n")
    with gzip.open(folder / "c.json.gz", "wt") as file:
        json.dump([{"text": numbered(9, first=300)}], file)
    (folder / "d.txt").write_text(f"none\n{numbered(9, first=500)}\n")
    train = batch(*((f"so {numbered(9, first=first)}", "a") for first in (0, 100, 200, 300, 400, 500)))
    hits = contamination.hits([train], [], settings, 1.0)
    found = {hit.id: (hit.where, hit.overlaps) for hit in hits}
    assert [found.get(id) for id in ids(train)] == [
        ("a.jsonl", "a.jsonl:2"),
        ("a.jsonl", "a.jsonl:2"),
        ("b.csv", "b.csv:2"),
        ("c.json.gz", "c.json.gz:1"),
        None,
        ("d.txt", "d.txt:2"),
    ]


def test_benchmarks_that_are_not_there_or_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    missing = Contamination(4, 0.6, str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl.*dedup\.contamination\.benchmarks"):
        contamination.hits([], [], missing, 0.5)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2: .*dedup\.contamination\.benchmarks"):
        contamination.hits([], [], Contamination(4, 0.6, str(tmp_path)), 0.5)


def test_nothing_to_compare_gives_no_hits(settings: Contamination) -> None:
    rows = batch((numbered(9), "a"))
    assert contamination.hits([], [], settings, 0.5) == []
    assert contamination.hits([rows], [], settings, 0.5) == []
    assert contamination.hits([], [("test", rows)], settings, 0.5) == []
