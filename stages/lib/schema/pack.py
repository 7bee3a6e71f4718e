"""conf/pack: which tokens are trained, and how tokenized rows fill training sequences."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class OnOverlong(StrEnum):
    """What becomes of a row of more than max_tokens. Plain text is cut into pieces whatever is set."""

    drop = "drop"
    error = "error"
    keep_start = "keep_start"  # cut at the end; dropped where no token to learn is left
    keep_end_of_prompt = (
        "keep_end_of_prompt"  # what stands before the last answer loses its beginning, that answer nothing
    )
    split_turns = "split_turns"  # several rows of whole turns, each with the system turn; a preference is dropped


class Labels(StrEnum):
    assistant_only = "assistant_only"  # every answer
    last_turn = "last_turn"  # the last answer
    all = "all"  # every token


class ControlTokens(StrEnum):
    text = "text"  # what looks like a control token in a content is encoded letter by letter
    drop = "drop"


@dataclass
class Pack:
    max_tokens: int  # of a row, and of the pack that holds several
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
