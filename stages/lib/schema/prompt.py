"""conf/prompt: how messages become text where the base model does not say so itself."""

from dataclasses import dataclass


@dataclass
class Prompt:
    template: str | None  # Jinja file beside this choice, used for a base model without a chat template
