"""conf/dedup: when two rows are duplicates, and what counts as contamination."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Keep(StrEnum):
    lowest_id = "lowest_id"
    longest = "longest"


@dataclass
class Contamination:
    ngram_words: int  # a run of so many words that train has in common with test or a benchmark
    min_overlap: float  # share of a test row's n-grams found in one training row from which that row is removed
    benchmarks: str  # file or folder of JSON Lines, CSV or text: rows nobody may train on


@dataclass
class Semantic:
    model: str | None  # folder of an encoder as transformers reads it; null: not looked for
    threshold: float  # cosine similarity of mean-pooled embeddings


@dataclass
class Dedup:
    threshold: float  # Jaccard similarity of word shingles from which a pair counts as near-duplicate
    shingle_words: int
    shared_fraction: float  # wording found in more than this share of a task's rows is its template, and not compared
    keep: Keep  # which row of several
    max_removed_fraction: float  # of the rows of one source; more ends the stage
    contamination: Contamination
    semantic: Semantic

    def __post_init__(self) -> None:
        overlap, semantic = self.contamination.min_overlap, self.semantic.threshold
        check_values(
            ("dedup.threshold", self.threshold, 0 < self.threshold <= 1, "above 0, at most 1"),
            ("dedup.shingle_words", self.shingle_words, self.shingle_words > 0, "a positive number of words"),
            ("dedup.shared_fraction", self.shared_fraction, 0 < self.shared_fraction <= 1, "above 0, at most 1"),
            (
                "dedup.max_removed_fraction",
                self.max_removed_fraction,
                0 <= self.max_removed_fraction <= 1,
                "between 0 and 1",
            ),
            (
                "dedup.contamination.ngram_words",
                self.contamination.ngram_words,
                self.contamination.ngram_words > 0,
                "a positive number of words",
            ),
            ("dedup.contamination.min_overlap", overlap, 0 < overlap <= 1, "above 0, at most 1"),
            ("dedup.semantic.threshold", semantic, 0 < semantic <= 1, "above 0, at most 1"),
        )
