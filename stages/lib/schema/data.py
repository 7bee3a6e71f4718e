"""conf/data: where the rows come from."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Source(StrEnum):
    python_docs = "python_docs"
    local = "local"
    hub = "hub"


class Format(StrEnum):
    auto = "auto"
    messages = "messages"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    csv = "csv"


@dataclass
class Data:
    source: Source
    path: str  # what `prepare` depends on: the user's file, or the lock file that pins the documented packages
    format: Format
    columns: dict[str, str]  # csv: {prompt: <column>, completion: <column>[, group: <column>]}
    id: str | None  # dataset on the Hugging Face hub
    revision: str | None
    split: str | None
    packages: list[str]  # python_docs: the packages read, installed and pinned by the lock file
    max_chars: int  # a row's messages together; longer rows are rejected

    def __post_init__(self) -> None:
        check_values(("data.max_chars", self.max_chars, self.max_chars > 0, "a positive number of characters"))
