"""conf/merge: which adapters are merged into which weights, and how that is measured."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.lib.errors import check_values


class Base(StrEnum):
    dequantized = "dequantized"  # models/base through numerics.quantization and back: what the adapter was trained on
    original = "original"  # models/base as it is


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Combination(StrEnum):
    """How PEFT makes one adapter of several; `w` is an adapter's weight.

    The first two sum the updates B A, the *_svd ones drop and elect in them as the papers do, and the rest work on A
    and B apart, whose product has cross terms: cheap, and only near to what its name says.
    """

    cat = "cat"  # the sum of w B A, exact; its rank is the sum of all ranks
    svd = "svd"  # the same sum, cut to the highest of the ranks
    linear = "linear"  # (sum of sqrt(w) B) (sum of sqrt(w) A)
    ties = "ties"  # drop the smallest, elect a sign, sum what agrees with it (arXiv:2306.01708)
    dare_linear = "dare_linear"  # drop at random, enlarge what is left, sum (arXiv:2311.03099)
    dare_ties = "dare_ties"
    magnitude_prune = "magnitude_prune"  # drop the smallest, sum
    ties_svd = "ties_svd"
    dare_linear_svd = "dare_linear_svd"
    dare_ties_svd = "dare_ties_svd"
    magnitude_prune_svd = "magnitude_prune_svd"


OF_EQUAL_RANK = (
    Combination.linear,
    Combination.ties,
    Combination.dare_linear,
    Combination.dare_ties,
    Combination.magnitude_prune,
)


@dataclass
class Merge:
    base: Base
    dtype: Dtype  # of the saved weights; the sum itself is taken in float32
    max_kl: float  # nats per token against 4-bit base + adapter, mean over held-out text
    rows: int  # held-out conversations whose probabilities are compared
    answers: int  # test rows that are answered, every task represented
    adapters: dict[str, Any]  # merged beside models/adapter: {name: {path: folder, sha256: of its files, weight: 1.0}}
    weight: float  # of models/adapter among merge.adapters
    combination: Combination
    density: float  # share of an update that ties, dare and magnitude_prune keep
    seed: int  # of what dare drops

    def __post_init__(self) -> None:
        incomplete = [
            str(name)
            for name, entry in self.adapters.items()
            if not isinstance(entry, dict)
            or set(entry) != {"path", "sha256", "weight"}
            or not isinstance(entry["path"], str)
            or not isinstance(entry["sha256"], str | None)
            or not isinstance(entry["weight"], float | int)
        ]
        check_values(
            ("merge.max_kl", self.max_kl, self.max_kl > 0, "above 0 nats"),
            ("merge.rows", self.rows, self.rows > 0, "a positive number of rows"),
            ("merge.answers", self.answers, self.answers > 0, "a positive number of rows"),
            (
                "merge.adapters",
                incomplete,
                not incomplete,
                "{name: {path: <folder>, sha256: <of its files, or null to be told>, weight: <number>}}",
            ),
            ("merge.weight", self.weight, bool(self.adapters) or self.weight == 1, "1 where merge.adapters is empty"),
            ("merge.density", self.density, 0 < self.density <= 1, "above 0, at most 1"),
        )
