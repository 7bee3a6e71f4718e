"""conf/pack: which tokens are trained, and how tokenized rows fill training sequences."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class OnOverlong(StrEnum):
    drop = "drop"
    error = "error"
    keep_start = "keep_start"  # cut at the end
    keep_end_of_prompt = "keep_end_of_prompt"  # the prompt loses its beginning, the answer nothing
    split_turns = "split_turns"  # several rows of whole turns


class Labels(StrEnum):
    assistant_only = "assistant_only"
    last_turn = "last_turn"
    all = "all"


class ControlTokens(StrEnum):
    text = "text"  # what looks like a control token in a content is encoded letter by letter
    drop = "drop"


@dataclass
class Pack:
    max_tokens: int
    on_overlong: OnOverlong
    labels: Labels
    control_tokens: ControlTokens
    max_lost_fraction: float  # of the tokens to train; more lost by cutting and dropping ends the stage

    def __post_init__(self) -> None:
        lost = self.max_lost_fraction
        check_values(
            ("pack.max_tokens", self.max_tokens, self.max_tokens >= 8, "at least 8 tokens"),
            ("pack.max_lost_fraction", lost, 0 <= lost <= 1, "between 0 and 1"),
        )
