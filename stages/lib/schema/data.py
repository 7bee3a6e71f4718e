"""conf/data: where the rows come from, what they look like, and what a row must be like to be kept."""

import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.lib.errors import ConfigError, check_values
from stages.lib.schema.split import SPLITS

FIELDS = (  # what a row may carry, by the names `data.columns` gives to the user's columns
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "question",
    "answer",
    "text",
    "chosen",
    "rejected",
    "label",
    "system",
    "tools",
    "group",
    "task",
)


class Source(StrEnum):
    python_docs = "python_docs"
    local = "local"
    hub = "hub"
    url = "url"


class Format(StrEnum):
    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    question_answer = "question_answer"
    text = "text"
    preference = "preference"
    unpaired = "unpaired"
    classification = "classification"


class Unicode(StrEnum):
    keep = "keep"
    nfc = "nfc"
    nfkc = "nfkc"


class Policy(StrEnum):
    ignore = "ignore"  # not looked for
    count = "count"  # type: ignore[assignment]  # kept and counted; nobody asks a policy for str.count
    redact = "redact"
    reject = "reject"


@dataclass
class Clean:
    """What is changed in a row, or makes it unwanted; each change and each rejection is counted."""

    unicode: Unicode  # normalization of every text
    whitespace: bool  # ends of lines without blanks, at most one empty line, no blanks around a text
    refusals: Policy  # answers of nothing but "As an AI language model, I cannot ..."; not redact
    pii: dict[str, Policy]  # kind (stages/lib/pii.py) -> what to do with it
    min_answer_chars: int
    max_answer_chars: int | None
    max_answer_ratio: float | None  # answer's characters per character of what it answers
    languages: list[str]  # ISO 639-1 codes of the languages kept; empty: all

    def __post_init__(self) -> None:
        strange = sorted(set(self.pii) - {"email", "phone", "card", "iban", "key"})
        words = [code for code in self.languages if not re.fullmatch(r"[a-z]{2,3}", code)]
        most, ratio = self.max_answer_chars, self.max_answer_ratio
        check_values(
            ("data.clean.pii", strange, not strange, "kinds among email, phone, card, iban, key"),
            ("data.clean.refusals", str(self.refusals), self.refusals is not Policy.redact, "ignore, count or reject"),
            ("data.clean.languages", words, not words, "ISO 639-1 codes such as en, de, zh"),
            ("data.clean.min_answer_chars", self.min_answer_chars, self.min_answer_chars >= 0, "0 or more characters"),
            (
                "data.clean.max_answer_chars",
                most,
                most is None or most >= max(1, self.min_answer_chars),
                "null, or at least data.clean.min_answer_chars",
            ),
            ("data.clean.max_answer_ratio", ratio, ratio is None or ratio > 0, "null, or above 0"),
        )


@dataclass
class Noise:
    """Rows of the training split given a second time with slips of the keyboard in the user's turns."""

    fraction: float  # of the rows
    rate: float  # of the words in a user's turn that get a slip
    kinds: list[str]  # typo, case, spacing
    seed: int

    def __post_init__(self) -> None:
        strange = sorted(set(self.kinds) - {"typo", "case", "spacing"})
        check_values(
            ("data.noise.fraction", self.fraction, 0 <= self.fraction <= 1, "between 0 and 1"),
            ("data.noise.rate", self.rate, 0 < self.rate <= 1, "above 0, at most 1"),
            ("data.noise.kinds", self.kinds, bool(self.kinds) and not strange, "some of typo, case, spacing"),
        )


@dataclass
class Data:
    source: Source
    path: str  # what `prepare` depends on: the user's file or folder, or the lock that pins the documented packages
    url: str | None  # any fsspec address: https://..., s3://..., gs://..., also with :: chains
    sha256: str | None  # of what lies at url
    id: str | None  # dataset on the Hugging Face hub
    revision: str | None
    split: str | None  # of a hub's data set: the files whose names say so
    packages: list[str]  # python_docs: the packages read, installed and pinned by the lock file
    format: Format
    columns: dict[str, str]  # {field: <your column>} where rows name them otherwise
    template: str | None  # Jinja file under conf/prompt that words the question; null: the format's own
    split_column: str | None  # column that says train, validation or test: an official split is never mixed again
    official: str | None  # the split all rows of this source belong to
    weight: float  # share of this source's rows in each split, against the other sources of `sources`
    sources: dict[str, Any]  # several sources: {name: {keys of this section that differ}}; empty: this section is one
    fraction: float  # of the training rows; a smaller fraction is contained in a larger one
    max_chars: int  # a row's texts together; longer rows are rejected
    max_rejected_fraction: float  # of the rows of one source; more ends the stage
    clean: Clean
    noise: Noise

    def __post_init__(self) -> None:
        is_hub, is_url = self.source is Source.hub, self.source is Source.url
        unknown = sorted(set(self.columns) - set(FIELDS))
        keys = {field.name for field in fields(self)} - {"sources", "fraction", "noise", "clean"}
        badly_named = [
            name
            for name, entry in self.sources.items()
            if not re.fullmatch(r"[\w.-]+", str(name)) or not isinstance(entry, dict)
        ]
        strange = sorted(
            {str(key) for entry in self.sources.values() if isinstance(entry, dict) for key in entry} - keys
        )
        check_values(
            ("data.max_chars", self.max_chars, self.max_chars > 0, "a positive number of characters"),
            ("data.fraction", self.fraction, 0 < self.fraction <= 1, "above 0, at most 1"),
            ("data.weight", self.weight, self.weight > 0, "above 0"),
            (
                "data.max_rejected_fraction",
                self.max_rejected_fraction,
                0 <= self.max_rejected_fraction <= 1,
                "between 0 and 1",
            ),
            ("data.columns", unknown, not unknown, f"names among {', '.join(FIELDS)}, each with a column of your file"),
            ("data.sources", badly_named, not badly_named, "{name: {key: value}} with names of letters, digits, _ . -"),
            ("data.sources", strange, not strange, f"keys among {', '.join(sorted(keys))}"),
            ("data.official", self.official, self.official in (None, *SPLITS), f"null or one of {', '.join(SPLITS)}"),
            (
                "data.template",
                self.template,
                self.template is None or is_template(self.template),
                "null or a Jinja file under conf/prompt, such as conf/prompt/alpaca.jinja",
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
            ("data.url", self.url, not is_url or bool(self.url), "an address when data.source=url"),
            (
                "data.sha256",
                self.sha256,
                not is_url or bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256 or "")),
                "the sha256 of the file in 64 hex digits when data.source=url: what lies at an address may change "
                "(`curl -L <url> | sha256sum`)",
            ),
            (
                "data.packages",
                self.packages,
                self.source is not Source.python_docs or bool(self.packages),
                "at least one installed package when data.source=python_docs",
            ),
        )
        self.each()

    def pinned(self) -> tuple[str, str]:
        """(id, commit) of a data set on the hub; without them it has been refused above."""
        assert self.id is not None
        assert self.revision is not None
        return self.id, self.revision

    def each(self) -> dict[str, "Data"]:
        """Every source by name, each as a section of its own: the keys of its entry over those of this section."""
        if not self.sources:
            return {"": self}
        return {name: replace(self, sources={}, **_typed(name, entry)) for name, entry in sorted(self.sources.items())}


def is_template(name: str) -> bool:
    """Whether a name is that of a Jinja file under conf/prompt: `prepare` depends on that folder."""
    path = PurePosixPath(name)
    return path.is_relative_to("conf/prompt") and ".." not in path.parts and path.suffix == ".jinja"


def _typed(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The values of one entry of `data.sources` in the types of the section's keys."""
    try:
        found: Any = OmegaConf.merge(OmegaConf.structured(Data), entry)
        values = {key: found[key] for key in entry}
    except OmegaConfBaseException as fault:
        raise ConfigError(f"data.sources.{name}: {str(fault).strip().splitlines()[0]}") from None
    return {key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in values.items()}
