"""Near-duplicates: what is compared, what is found, what is kept."""

import random
from typing import Any

import pytest

from stages.lib import dedup, records
from stages.lib.schema.dedup import Dedup

SETTINGS = Dedup(threshold=0.8, shingle_words=3, shared_fraction=0.5, num_perm=128, bands=32)
WORDS = [
    f"{first}{second}" for first in "bcdfghklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "ir", "os")
]


def row(
    prompt: str, answer: str = "yes", *, system: str | None = None, group: str = "", task: str = "chat"
) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return records.make(turns, group=group, source="test", task=task)


def sentence(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def test_words_ignore_case_and_punctuation_but_keep_signs() -> None:
    assert dedup.words("Axis : int, OPTIONAL") == ["axis", "int", "optional"]
    assert dedup.words("a+b") != dedup.words("a-b")


def test_jaccard_is_shared_over_all() -> None:
    assert dedup.jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4})) == 0.5


def test_rows_that_differ_in_case_and_punctuation_only_are_exact_duplicates() -> None:
    found = dedup.near_duplicates([row("What is it?"), row("what is it")], SETTINGS)
    assert [dropped.reason for dropped in found.dropped] == ["exact"]
    assert found.dropped[0].kept_id == found.kept[0]["id"]


def test_one_changed_word_in_sixty_is_a_near_duplicate_and_names_the_kept_row_and_the_score() -> None:
    words = sentence(1)
    changed = [*words[:30], "other", *words[31:]]
    found = dedup.near_duplicates([row(" ".join(words)), row(" ".join(changed))], SETTINGS)
    (dropped,) = found.dropped
    assert dropped.reason == "near"
    assert dropped.kept_id == found.kept[0]["id"]
    assert dropped.score == pytest.approx((59 - 3) / (59 + 3))  # 61 words give 59 shingles; 3 of them changed


def test_a_chain_is_one_cluster_but_only_rows_near_a_kept_one_are_dropped() -> None:
    words = sentence(2, 80)
    chain = [row(" ".join([*words[: 80 - 5 * step], *sentence(90, 5 * step)])) for step in range(3)]
    first, middle, last = (dedup.shingles(chain, SETTINGS)[number] for number in range(3))
    assert dedup.jaccard(first, middle) >= 0.8
    assert dedup.jaccard(middle, last) >= 0.8
    assert dedup.jaccard(first, last) < 0.8
    found = dedup.near_duplicates(chain, SETTINGS)
    assert len(set(found.clusters.values())) == 1
    kept = {kept["id"] for kept in found.kept}
    assert all(dropped.kept_id in kept for dropped in found.dropped)
    assert all(dropped.score is not None and dropped.score >= 0.8 for dropped in found.dropped)


def test_a_thousand_distinct_rows_under_one_long_instruction_are_all_kept() -> None:
    instruction = " ".join(sentence(3, 130))
    rows = [row(f"{instruction}\n\n{' '.join(sentence(number, 12))}") for number in range(100, 1100)]
    assert dedup.near_duplicates(rows, SETTINGS).dropped == []


def test_a_shared_system_prompt_is_not_compared() -> None:
    system = " ".join(sentence(4, 200))
    found = dedup.near_duplicates([row("one two three", system=system), row("four five six", system=system)], SETTINGS)
    assert found.dropped == []


def test_a_row_of_nothing_but_shared_wording_still_has_something_to_compare() -> None:
    rows = [row("say yes", f"yes {' '.join(sentence(number, 9))}") for number in range(20)] + [row("say yes", "yes")]
    assert all(dedup.shingles(rows, SETTINGS))


def test_planted_near_duplicates_above_point_nine_are_all_found() -> None:
    originals = [sentence(number, 100) for number in range(300)]
    edited = [[*words[:50], "edited", *words[51:]] for words in originals]
    found = dedup.near_duplicates([row(" ".join(words)) for words in originals + edited], SETTINGS)
    assert len(found.dropped) == 300


def test_the_result_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [row(" ".join([*sentence(number % 40, 30), "tail", str(number // 40)])) for number in range(120)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert dedup.near_duplicates(rows, SETTINGS) == dedup.near_duplicates(shuffled, SETTINGS)


def test_the_exact_join_finds_what_comparing_every_pair_finds() -> None:
    base = [sentence(number, 20) for number in range(60)]
    left = {f"l{n}": dedup.shingles([row(" ".join(words))], SETTINGS)[0] for n, words in enumerate(base)}
    noisy = [
        [word if random.Random(f"{n}{k}").random() > 0.04 else "zz" for k, word in enumerate(words)]
        for n, words in enumerate(base)
    ]
    right = {f"r{n}": dedup.shingles([row(" ".join(words))], SETTINGS)[0] for n, words in enumerate(noisy)}
    for threshold in (0.5, 0.8, 1.0):
        every = {(a, b) for a in left for b in right if dedup.jaccard(left[a], right[b]) >= threshold}
        assert {(a, b) for a, b, _ in dedup.similar_across(left, right, threshold)} == every
        assert every


def test_the_exact_join_finds_a_pair_exactly_at_the_threshold() -> None:
    left = {str(size): frozenset(range(size)) for size in range(1, 201)}
    right = {str(size): frozenset(range(size)) for size in range(1, 201)}
    every = {(a, b) for a in left for b in right if dedup.jaccard(left[a], right[b]) >= 0.55}
    assert {(a, b) for a, b, _ in dedup.similar_across(left, right, 0.55)} == every
    assert ("100", "55") in every
