"""conf/dedup: when two rows are near-duplicates."""

from dataclasses import dataclass

from stages.lib.errors import check_values


@dataclass
class Dedup:
    threshold: float  # Jaccard similarity of word shingles from which a pair counts as near-duplicate
    shingle_words: int
    shared_fraction: float  # wording found in more than this share of a task's rows is its template, and not compared
    num_perm: int  # MinHash permutations; bands * rows per band
    bands: int

    def __post_init__(self) -> None:
        divides = self.bands > 0 and self.num_perm > 0 and self.num_perm % self.bands == 0
        check_values(
            ("dedup.threshold", self.threshold, 0 < self.threshold <= 1, "above 0, at most 1"),
            ("dedup.shingle_words", self.shingle_words, self.shingle_words > 0, "a positive number of words"),
            ("dedup.shared_fraction", self.shared_fraction, 0 < self.shared_fraction <= 1, "above 0, at most 1"),
            ("dedup.bands", self.bands, divides, "a divisor of dedup.num_perm"),
        )
