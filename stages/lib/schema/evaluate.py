"""conf/evaluate: how base and tuned model are compared."""

from dataclasses import dataclass

from stages.lib.errors import check_values


@dataclass
class Evaluate:
    seed: int  # of the examples chosen and of the bootstrap; not the training's
    fewshot: int  # examples from train in front of the few-shot prompts
    batch_size: int
    max_new_tokens: int
    answer_margin: int  # tokens an answer may be longer than the longest reference of its task; max_new_tokens caps it
    base_16bit: bool  # also score the references with the base model before quantization
    bootstrap_samples: int
    confidence: float

    def __post_init__(self) -> None:
        check_values(
            ("evaluate.fewshot", self.fewshot, self.fewshot > 0, "a positive number of examples"),
            ("evaluate.batch_size", self.batch_size, self.batch_size > 0, "a positive number of rows"),
            ("evaluate.max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "a positive number of tokens"),
            ("evaluate.answer_margin", self.answer_margin, self.answer_margin >= 0, "zero or more tokens"),
            ("evaluate.bootstrap_samples", self.bootstrap_samples, self.bootstrap_samples >= 100, "at least 100"),
            ("evaluate.confidence", self.confidence, 0.5 <= self.confidence < 1, "at least 0.5, below 1"),
        )
