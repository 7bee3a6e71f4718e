"""conf/pack: how tokenized conversations fill training sequences."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class OnOverlong(StrEnum):
    drop = "drop"
    error = "error"


@dataclass
class Pack:
    max_tokens: int
    on_overlong: OnOverlong

    def __post_init__(self) -> None:
        check_values(("pack.max_tokens", self.max_tokens, self.max_tokens >= 8, "at least 8 tokens"))
