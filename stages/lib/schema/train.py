"""conf/train: the optimisation."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Scheduler(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant_with_warmup"


@dataclass
class Train:
    learning_rate: float
    epochs: float
    batch_size: int  # packs per forward pass
    gradient_accumulation_steps: int
    scheduler: Scheduler
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    evals_per_epoch: int
    early_stopping_patience: int  # evaluations in a row without a better validation loss; 0: never stop early
    samples: int  # validation prompts answered at each evaluation, for the eye
    sample_tokens: int  # longest answer among those

    def __post_init__(self) -> None:
        check_values(
            ("train.learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            ("train.epochs", self.epochs, self.epochs > 0, "above 0"),
            ("train.batch_size", self.batch_size, self.batch_size > 0, "a positive number of packs"),
            (
                "train.gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                self.gradient_accumulation_steps > 0,
                "a positive number of batches",
            ),
            ("train.warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio < 1, "at least 0, below 1"),
            ("train.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("train.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0"),
            ("train.evals_per_epoch", self.evals_per_epoch, self.evals_per_epoch > 0, "at least 1"),
            (
                "train.early_stopping_patience",
                self.early_stopping_patience,
                self.early_stopping_patience >= 0,
                "at least 1, or 0 to train to the end",
            ),
            ("train.samples", self.samples, self.samples >= 0, "at least 0"),
            ("train.sample_tokens", self.sample_tokens, self.sample_tokens > 0, "at least 1"),
        )
