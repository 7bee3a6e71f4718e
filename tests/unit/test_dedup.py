"""Duplicates: what is compared, what is found, what is kept."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stages.lib import dedup, join, records
from stages.lib.dedup import Compared, Deduplicated
from stages.lib.errors import DataError
from stages.lib.join import Pairs
from stages.lib.ngrams import Ngrams, starts, word_ngrams
from stages.lib.schema.dedup import Contamination, Dedup, Keep, Semantic

WORDS = [
    f"{first}{second}" for first in "bcdfghklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "ir", "os")
]


def settings(keep: Keep = Keep.lowest_id) -> Dedup:
    return Dedup(
        threshold=0.8,
        shingle_words=3,
        shared_fraction=0.5,
        keep=keep,
        max_removed_fraction=1.0,
        contamination=Contamination(13, 0.8, "data/benchmarks"),
        semantic=Semantic(None, 0.9),
    )


def row(prompt: str, answer: str = "yes", *, system: str | None = None, **more: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return records.make(turns, **{"group": "", "source": "test", "task": "chat", **more})


def compared(rows: Sequence[dict[str, Any]], size: int = 10_000) -> Compared:
    batches = records.table(rows).combine_chunks().to_batches(max_chunksize=size)
    return Compared.joined(dedup.compared(batch, 3) for batch in batches)


def deduplicated(rows: Sequence[dict[str, Any]], keep: Keep = Keep.lowest_id, size: int = 10_000) -> Deduplicated:
    return dedup.near_duplicates(compared(rows, size), settings(keep))


def shingles(rows: Sequence[dict[str, Any]]) -> Ngrams:
    """What rows with different words are compared by."""
    found = compared(rows)
    return deduplicated(rows).wording.without(Ngrams.joined(found.shingles), found.facts.task)


def kept(rows: Sequence[dict[str, Any]], keep: Keep = Keep.lowest_id) -> set[str]:
    return {rows[number]["id"] for number in deduplicated(rows, keep).kept.tolist()}


def sentence(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], *places: int) -> str:
    return " ".join("other" + word if place in places else word for place, word in enumerate(words))


def sets_of(found: Ngrams) -> list[set[int]]:
    return [set(found.of(number).tolist()) for number in range(len(found))]


def named(rows: Sequence[dict[str, Any]], found: Deduplicated) -> set[tuple[Any, ...]]:
    """What was dropped, for which row, how similar, in which cluster, by ids."""
    ids = [row["id"] for row in rows]
    pairs = zip(found.dropped.tolist(), found.repeats.tolist(), found.score.tolist(), strict=True)
    return {(ids[left], ids[right], score, ids[found.cluster[left]]) for left, right, score in pairs}


def ngrams_of(sets: Sequence[Sequence[int]]) -> Ngrams:
    """Sets of small numbers as sets of hashes."""
    hashes = np.random.default_rng(0).integers(0, 2**63, 100_000, dtype=np.uint64)
    return Ngrams(
        starts(np.array([len(numbers) for numbers in sets])),
        np.concatenate([np.sort(hashes[list(numbers)]) for numbers in sets]),
    )


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("Axis : int, OPTIONAL", "axis int optional", True),
        ("axis int", "axisint", False),
        ("a+b", "a-b", False),
        ("a+b", "a + b", True),
        ("\ufb01ne", "fine", True),  # the ligature
        ("日本語", "日 本 語", True),
        ("की", "का", False),  # a vowel sign
        ("...", "!!!", False),  # no words: the text itself
    ],
)
def test_words_are_without_case_and_punctuation_but_keep_signs(one: str, other: str, are_equal: bool) -> None:
    left, right = sets_of(word_ngrams([one, other], 3))
    assert (left == right) is are_equal


def test_a_text_has_the_same_ngrams_whatever_stands_beside_it() -> None:
    texts = [
        "one two three four",
        "",
        "Ünï 日本語テスト a_b + c",
        "...",
        "one",
        "two three four five six two three four",
    ]
    together = sets_of(word_ngrams(texts, 3))
    assert together == [sets_of(word_ngrams([text], 3))[0] for text in texts]
    assert [len(grams) for grams in together] == [2, 1, 8, 1, 1, 5]


def test_everything_said_is_compared_but_not_the_system_prompt_and_the_tools() -> None:
    call = [{"name": "add", "arguments": {"a": 1}}]
    turns = [{"role": "user", "content": "sum"}, {"role": "assistant", "content": None, "tool_calls": call}]
    rows = [
        row("question", "answer", system="be kind"),
        row("", "", tools=[{"name": "add"}]) | {"messages": turns},
        records.make(text="words", kind="text", group="", source="test", task="chat"),
        row("ask", "so", kind="preference", chosen=[{"role": "assistant", "content": "good"}], rejected=[]),
    ]
    texts = dedup.compared_texts(records.table(rows)).to_pylist()
    assert texts == ["question\nanswer", 'sum\n[{"arguments": {"a": 1}, "name": "add"}]', "words", "ask\nso\ngood\n"]


def test_rows_that_differ_in_case_and_punctuation_only_are_exact_duplicates() -> None:
    found = deduplicated([row("What is it?"), row("what is it")])
    assert found.reason.tolist() == ["exact"]
    assert found.repeats.tolist() == found.kept.tolist()


def test_one_changed_word_in_sixty_is_a_near_duplicate_and_names_the_kept_row_and_the_score() -> None:
    words = sentence(1)
    found = deduplicated([row(" ".join(words)), row(changed(words, 30))])
    assert found.reason.tolist() == ["near"]
    assert found.repeats.tolist() == found.kept.tolist()
    assert found.score[0] == pytest.approx((59 - 3) / (59 + 3))  # 61 words give 59 shingles; 3 of them changed


def test_a_chain_is_one_cluster_but_only_rows_near_a_kept_one_are_dropped() -> None:
    words = sentence(2, 80)
    chain = [row(" ".join([*words[: 80 - 5 * step], *sentence(90, 5 * step)]), group=f"{step}") for step in range(3)]
    chain[1] |= {"id": "0"}  # between the two others in likeness: kept first, both others go; kept last, it goes
    assert len(deduplicated(chain).kept) == 1
    chain[1] |= {"id": "f" * 64}
    found = deduplicated(chain)
    assert sorted(found.kept.tolist()) == [0, 2]
    assert found.dropped.tolist() == [1]
    assert len(set(found.cluster.tolist())) == 1


def test_a_thousand_distinct_rows_under_one_long_instruction_are_all_kept() -> None:
    instruction = " ".join(sentence(3, 260))
    assert len(instruction) > 800
    rows = [row(f"{instruction}\n\n{' '.join(sentence(number, 12))}") for number in range(100, 1100)]
    assert len(kept(rows)) == 1000


def test_a_thousand_distinct_rows_under_one_long_system_prompt_are_all_kept() -> None:
    system = " ".join(sentence(4, 260))
    rows = [row(" ".join(sentence(number, 12)), system=system) for number in range(100, 1100)]
    assert len(kept(rows)) == 1000


def test_a_template_of_one_task_is_compared_in_another() -> None:
    template = " ".join(sentence(5, 40))
    many = [row(f"{template} {' '.join(sentence(number, 12))}") for number in range(100, 120)]
    rows = [*many, row(template, task="other")]
    sizes = shingles(rows).sizes
    assert sizes[:20].max() < 16
    assert sizes[20] == 39


def test_a_row_of_nothing_but_shared_wording_still_has_something_to_compare() -> None:
    rows = [row("say yes", f"yes {' '.join(sentence(number, 9))}") for number in range(20)] + [row("say yes", "yes")]
    assert shingles(rows).sizes.tolist() == [9] * 20 + [1]


def test_planted_near_duplicates_are_all_found() -> None:
    originals = [sentence(number, 100) for number in range(300)]
    edited = [changed(words, 20, 50, 80) for words in originals]  # 9 of 99 shingles: similarity 0.83
    assert len(kept([row(" ".join(words)) for words in originals] + [row(text) for text in edited])) == 300


def test_what_is_kept_depends_neither_on_the_order_of_the_rows_nor_on_the_batches() -> None:
    rows = [row(" ".join([*sentence(number % 40, 30), "tail", str(number // 40)])) for number in range(120)]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, other = deduplicated(rows), deduplicated(shuffled, size=7)
    assert named(rows, one) == named(shuffled, other)
    assert {rows[number]["id"] for number in one.kept.tolist()} == {shuffled[n]["id"] for n in other.kept.tolist()}


def test_the_longest_of_several_is_kept_when_asked_for() -> None:
    words = sentence(6)
    long, short = row(" ".join(words)), row(" ".join(words[:-4]))
    for first, second in ((long, short), (short, long)):
        rows = [first | {"id": "0"}, second | {"id": "1"}]
        assert kept(rows, Keep.longest) == {rows[0 if first is long else 1]["id"]}
        assert kept(rows) == {"0"}


def test_official_held_out_rows_are_kept_and_what_repeats_them_goes() -> None:
    words = sentence(7)
    rows = [
        row(" ".join(words), split="train") | {"id": "0"},
        row(changed(words, 10), split="validation") | {"id": "1"},
        row(changed(words, 20), split="test") | {"id": "2"},
        row(changed(words, 30), split="test") | {"id": "3"},
    ]
    assert kept(rows) == {"2", "3"}


def test_a_synthetic_row_gives_way_to_a_row_it_repeats() -> None:
    words = sentence(8)
    rows = [row(" ".join(words), source="synthetic") | {"id": "0"}, row(changed(words, 10)) | {"id": "1"}]
    assert kept(rows) == {"1"}


@pytest.mark.parametrize("threshold", [0.1, 0.55, 0.8, 1.0])
def test_the_join_finds_what_comparing_every_pair_finds(threshold: float) -> None:
    chance = random.Random(0)
    centres = [chance.sample(range(300), 40) for _ in range(20)]
    rows = [
        sorted({number if chance.random() > 0.06 else chance.randrange(300) for number in centres[place % 20]})
        for place in range(200)
    ]
    sets = ngrams_of(rows)
    found = join.Join(sets, threshold)
    found.add(np.arange(100))
    pairs = found.matches(np.arange(100, 200))
    every = {
        (left, right, len(set(rows[left]) & set(rows[right])) / len(set(rows[left]) | set(rows[right])))
        for left in range(100, 200)
        for right in range(100)
    }
    expected = {pair for pair in every if pair[2] >= threshold}
    assert set(zip(pairs.left.tolist(), pairs.right.tolist(), pairs.score.tolist(), strict=True)) == expected


def test_the_join_finds_a_pair_exactly_at_the_threshold() -> None:
    sets = ngrams_of([range(size) for size in (100, 55, 54)])
    found = join.Join(sets, 0.55)
    found.add(np.array([0]))
    assert found.matches(np.array([1, 2])).left.tolist() == [1]


def test_rows_that_are_all_alike_are_settled_in_halves_and_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [sorted({*range(60), 1000 + number}) for number in range(100)]
    expected = [[0], [0, 1]]
    for piece, apart in ((2**22, None), (50, None), (50, np.array([1, 1] + [0] * 98, np.int8))):
        monkeypatch.setattr(join, "PIECE", piece)
        found = join.Join(ngrams_of(rows), 0.8, apart=apart)
        assert join.greedy(found, 100).tolist() == expected[apart is not None]


def test_wording_shared_by_exactly_the_fraction_is_compared() -> None:
    rows = [row(f"{'one two three ' if number < 5 else ''}{' '.join(sentence(number, 5))}") for number in range(10)]
    assert not len(deduplicated(rows).wording.shared)
    rows[5] = row(f"one two three {' '.join(sentence(5, 5))}")
    assert len(deduplicated(rows).wording.shared) == 1


def test_semantic_pairs_drop_the_later_row_but_never_within_an_official_split() -> None:
    rows = [row(" ".join(sentence(number))) | {"id": str(number)} for number in range(4)]
    pairs = Pairs(np.array([1, 2, 3]), np.array([0, 1, 2]), np.array([0.9, 0.91, 0.92]))
    found = compared(rows)
    after = dedup.without_semantic(found.facts, dedup.near_duplicates(found, settings()), pairs)
    assert after.kept.tolist() == [0, 2]  # 2 is alike to 1 alone, which goes
    assert (after.dropped.tolist(), after.repeats.tolist()) == ([1, 3], [0, 2])
    assert after.reason.tolist() == ["semantic", "semantic"]
    official = compared([row | {"split": "test"} for row in rows])
    assert len(dedup.without_semantic(official.facts, dedup.near_duplicates(official, settings()), pairs).kept) == 4


def test_a_source_of_which_too_much_is_dropped_ends_the_stage() -> None:
    facts = compared([row(str(number), source="ab"[number % 2]) for number in range(8)]).facts
    assert dedup.removed_fractions(facts, np.array([0, 1, 2]), 0.5) == {"a": 0.5, "b": 0.25}
    with pytest.raises(DataError, match=r"0\.500 of the rows of a repeat.*dedup\.max_removed_fraction"):
        dedup.removed_fractions(facts, np.array([0, 1, 2]), 0.4)


def test_texts_come_in_the_order_they_are_asked_for() -> None:
    batches = records.table([row(str(number)) for number in range(9)]).to_batches(max_chunksize=2)
    assert dedup.texts_of(batches, np.array([7, 0, 8])).to_pylist() == ["7\nyes", "0\nyes", "8\nyes"]


def test_rows_of_a_source_apart_give_way_to_others_whatever_their_ids_and_tie_nothing() -> None:
    for seed in range(6):
        words = sentence(seed)
        first, between, second = changed(words, 3), changed(words, 3, 20), changed(words, 20)
        rows = [row(first), row(between, source="far"), row(second)]
        found = dedup.near_duplicates(compared(rows), replace(settings(), threshold=0.9), ["far"])
        assert {rows[number]["id"] for number in found.kept.tolist()} == {rows[0]["id"], rows[2]["id"]}
        assert found.cluster[0] != found.cluster[2]
