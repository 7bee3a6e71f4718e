"""conf/split: how rows are divided into train, validation and test."""

from dataclasses import dataclass

from stages.lib.errors import check_values

SPLITS = ("train", "validation", "test")


@dataclass
class Split:
    seed: int  # of the hash that places groups; not the training's, so that a sweep over seeds keeps its test rows
    validation_fraction: float
    test_fraction: float
    max_rows: dict[str, dict[str, int]]  # split -> task -> rows kept at most; a task that is not named is not limited

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        unknown = sorted(set(self.max_rows) - set(SPLITS))
        smallest = min((n for tasks in self.max_rows.values() for n in tasks.values()), default=0)
        check_values(
            ("split.validation_fraction", self.validation_fraction, self.validation_fraction > 0, "above 0"),
            ("split.test_fraction", self.test_fraction, self.test_fraction > 0, "above 0"),
            ("split.validation_fraction + split.test_fraction", held_out, held_out < 1, "below 1, the rest is train"),
            ("split.max_rows", unknown, not unknown, f"splits among {', '.join(SPLITS)}"),
            ("split.max_rows", smallest, smallest >= 0, "no negative number of rows"),
        )
