"""conf/evaluate: how base and tuned model are compared."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.lib.errors import check_values

ARMS = ("base", "fewshot", "tuned")
NAME = re.compile(r"[a-z][a-z0-9_.-]*", re.IGNORECASE)


class Classify(StrEnum):
    likelihood = "likelihood"  # the most likely of all labels is the answer
    generate = "generate"  # the model writes its answer as in any other task


@dataclass
class GeneralText:
    package: str | None  # an installed package whose files are the text; null: not measured
    files: str  # pattern of their names
    tokens: int  # measured at most
    window: int  # tokens that are read together; what stands before them is not seen

    def __post_init__(self) -> None:
        check_values(
            ("evaluate.general_text.window", self.window, self.window > 1, "at least 2 tokens"),
            (
                "evaluate.general_text.tokens",
                self.tokens,
                self.tokens >= 2 * self.window,
                "tokens of at least two windows (evaluate.general_text.window)",
            ),
        )


@dataclass
class Evaluate:
    seed: int  # of the examples chosen and of the bootstrap; not the training's
    fewshot: int  # examples from train in front of the few-shot prompts
    batch_size: int
    max_new_tokens: int
    answer_margin: int  # tokens an answer may be longer than the longest reference of its task; max_new_tokens caps it
    max_rows: dict[str, int]  # {arm: rows of each task it answers}; an arm that is not named answers all
    classify: Classify  # how tasks are answered whose references are labels
    others: dict[str, Any]  # further arms: {name: {path: folder of a model or an adapter, sha256: of its files}}
    base_16bit: bool  # also score the references with the base model before quantization
    general_text: GeneralText
    bootstrap_samples: int
    confidence: float

    def __post_init__(self) -> None:
        badly_named = sorted(str(name) for name in self.others if not NAME.fullmatch(str(name)) or name in ARMS)
        incomplete = [
            str(name)
            for name, entry in self.others.items()
            if not isinstance(entry, dict)
            or set(entry) != {"path", "sha256"}
            or not isinstance(entry["path"], str)
            or not isinstance(entry["sha256"], str | None)
        ]
        strange = sorted(set(self.max_rows) - {*ARMS, *map(str, self.others)})
        check_values(
            ("evaluate.fewshot", self.fewshot, self.fewshot > 0, "a positive number of examples"),
            ("evaluate.batch_size", self.batch_size, self.batch_size > 0, "a positive number of rows"),
            ("evaluate.max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "a positive number of tokens"),
            ("evaluate.answer_margin", self.answer_margin, self.answer_margin >= 0, "zero or more tokens"),
            (
                "evaluate.max_rows",
                self.max_rows,
                not strange and all(rows > 0 for rows in self.max_rows.values()),
                f"a positive number of rows for arms among {', '.join((*ARMS, *map(str, self.others)))}",
            ),
            ("evaluate.others", badly_named, not badly_named, f"names of letters and digits, not {', '.join(ARMS)}"),
            (
                "evaluate.others",
                incomplete,
                not incomplete,
                "{name: {path: <folder>, sha256: <of its files, or null to be told>}}",
            ),
            ("evaluate.bootstrap_samples", self.bootstrap_samples, self.bootstrap_samples >= 100, "at least 100"),
            ("evaluate.confidence", self.confidence, 0.5 <= self.confidence < 1, "at least 0.5, below 1"),
        )
