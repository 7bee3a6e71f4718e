"""conf/prompt: how messages become text where the base model does not say so itself."""

from dataclasses import dataclass
from enum import StrEnum


class Use(StrEnum):
    missing = "missing"
    always = "always"


@dataclass
class Prompt:
    template: str  # path of a Jinja file
    use: Use  # for a base model without a chat template, or instead of the model's own
