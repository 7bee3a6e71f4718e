"""conf/split: how rows are divided into train, validation and test."""

from dataclasses import dataclass
from typing import Any

from stages.lib.errors import check_values

SPLITS = ("train", "validation", "test")
OUT_OF_DISTRIBUTION = "_ood"
"""Ends the name of a task whose rows are of a source out of distribution."""


def task_in_train(task: str) -> str:
    """The task of train that a task belongs to: itself, or the one whose rows out of distribution it holds."""
    return task.removesuffix(OUT_OF_DISTRIBUTION)


@dataclass
class Split:
    seed: int  # of the hash that places groups; not the training's, so that a sweep over seeds keeps its test rows
    validation_fraction: float
    test_fraction: float
    max_rows: dict[
        str, Any
    ]  # {split: {task: rows kept at most}}; a task that is not named is not limited. Any, because
    # OmegaConf cannot merge an experiment's values into nested typed dictionaries
    out_of_distribution: list[str]  # sources whose rows are in test only, as tasks of their own, `<task>_ood`

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        is_table = set(self.max_rows) <= set(SPLITS) and all(
            isinstance(tasks, dict) and all(isinstance(n, int) and n >= 0 for n in tasks.values())
            for tasks in self.max_rows.values()
        )
        check_values(
            ("split.validation_fraction", self.validation_fraction, self.validation_fraction > 0, "above 0"),
            ("split.test_fraction", self.test_fraction, self.test_fraction > 0, "above 0"),
            ("split.validation_fraction + split.test_fraction", held_out, held_out < 1, "below 1, the rest is train"),
            (
                "split.max_rows",
                self.max_rows,
                is_table,
                f"{{split: {{task: rows}}}} with splits among {', '.join(SPLITS)}",
            ),
        )
