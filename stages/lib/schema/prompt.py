"""conf/prompt: how messages become text where the base model does not say so itself."""

from dataclasses import dataclass


@dataclass
class Prompt:
    template: str  # path of a Jinja file, used for a base model without a chat template
