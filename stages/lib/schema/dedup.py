"""conf/dedup: when two rows are near-duplicates."""

from dataclasses import dataclass

from stages.lib.errors import check_values


@dataclass
class Dedup:
    threshold: float  # Jaccard similarity of word shingles from which a pair counts as near-duplicate
    shingle_words: int
    num_perm: int  # MinHash permutations; bands * rows per band
    bands: int

    def __post_init__(self) -> None:
        check_values(
            ("dedup.threshold", self.threshold, 0 < self.threshold <= 1, "above 0, at most 1"),
            ("dedup.shingle_words", self.shingle_words, self.shingle_words > 0, "a positive number of words"),
            ("dedup.bands", self.bands, self.bands > 0 and self.num_perm % self.bands == 0, "a divisor of dedup.num_perm"),
        )
