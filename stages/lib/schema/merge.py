"""conf/merge: which weights the adapter is merged into."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Base(StrEnum):
    dequantized = "dequantized"  # models/base through NF4 and back: what the adapter was trained on
    original = "original"  # models/base as it is


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class Merge:
    base: Base
    dtype: Dtype  # of the saved weights; the sum itself is taken in float32
    max_kl: float  # nats per token against 4-bit base + adapter, mean over held-out text
    rows: int  # held-out conversations measured

    def __post_init__(self) -> None:
        check_values(
            ("merge.max_kl", self.max_kl, self.max_kl > 0, "above 0 nats"),
            ("merge.rows", self.rows, self.rows > 0, "a positive number of rows"),
        )
