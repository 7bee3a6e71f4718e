"""conf/data: where the rows come from."""

import re
from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values

COLUMNS = ("prompt", "completion", "system", "group", "task")


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
    columns: dict[
        str, str
    ]  # {prompt: <column>, completion: <column>[, system:, group:, task:]} where rows name them so
    id: str | None  # dataset on the Hugging Face hub
    revision: str | None
    split: str | None
    packages: list[str]  # python_docs: the packages read, installed and pinned by the lock file
    max_chars: int  # a row's messages together; longer rows are rejected

    def __post_init__(self) -> None:
        is_hub = self.source is Source.hub
        unknown = sorted(set(self.columns) - set(COLUMNS))
        check_values(
            ("data.max_chars", self.max_chars, self.max_chars > 0, "a positive number of characters"),
            (
                "data.columns",
                unknown,
                not unknown,
                f"names among {', '.join(COLUMNS)}, each with a column of your file",
            ),
            (
                "data.columns",
                self.columns,
                self.format is not Format.csv or {"prompt", "completion"} <= set(self.columns),
                "prompt and completion, each with a column of your file, when data.format=csv",
            ),
            (
                "data.id",
                self.id,
                not is_hub or bool(self.id),
                "a data set on the hub, owner/name, when data.source=hub",
            ),
            (
                "data.revision",
                self.revision,
                not is_hub or bool(re.fullmatch(r"[0-9a-f]{40}", self.revision or "")),
                "a commit of 40 hex digits when data.source=hub. A branch moves; type `make pin` once: it asks the hub "
                "and writes the commit into conf/data",
            ),
            (
                "data.packages",
                self.packages,
                self.source is not Source.python_docs or bool(self.packages),
                "at least one installed package when data.source=python_docs",
            ),
        )

    def pinned(self) -> tuple[str, str]:
        """(id, commit) of a data set on the hub; without them it has been refused above."""
        assert self.id is not None
        assert self.revision is not None
        return self.id, self.revision
