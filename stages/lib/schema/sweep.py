"""conf/sweep: what ties experiments together, and the points a sweep consists of; no stage tracks it."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.lib.errors import check_values

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RANGE = {"low", "high", "log", "step"}


class Direction(StrEnum):
    minimize = "minimize"
    maximize = "maximize"


class Sampler(StrEnum):
    tpe = "tpe"  # models where good points lie (arXiv:2304.11127)
    gp = "gp"  # a Gaussian process: for few and dear trials of numbers
    random = "random"


@dataclass
class Pruning:
    keep: float  # a training goes on while its best loss is among this share of those at the same evaluation
    after_trials: int  # finished trials before any is stopped
    after_evaluations: int  # evaluations that a training has in any case

    def __post_init__(self) -> None:
        check_values(
            ("sweep.search.pruning.keep", self.keep, 0 < self.keep < 1, "above 0, below 1"),
            ("sweep.search.pruning.after_trials", self.after_trials, self.after_trials > 0, "at least 1"),
            (
                "sweep.search.pruning.after_evaluations",
                self.after_evaluations,
                self.after_evaluations >= 0,
                "at least 0",
            ),
        )


@dataclass
class Search:
    metric: str  # as metrics/*.json of a stage up to the target name it
    direction: Direction
    trials: int  # points in all, those that were stopped or failed among them
    seed: int  # of what is proposed
    sampler: Sampler
    space: dict[str, Any]  # {key: [values] or {low, high[, step][, log]}}; whole numbers where low and high are
    pruning: Pruning | None  # on the validation loss; null: every training goes to its end

    def __post_init__(self) -> None:
        faults = [f"{key}: {fault}" for key, domain in self.space.items() if (fault := _fault(domain))]
        check_values(
            ("sweep.search.trials", self.trials, self.trials > 0, "at least 1"),
            ("sweep.search.seed", self.seed, self.seed >= 0, "at least 0"),
            ("sweep.search.space", self.space, len(self.space) > 0, "at least one key"),
            ("sweep.search.space", faults, not faults, "[values], or {low, high} with step or log: true, or neither"),
        )


def _fault(domain: Any) -> str | None:
    """Why nothing can be drawn from a key's domain; None where it can."""
    if isinstance(domain, list):
        texts = [repr(value) for value in domain]
        return None if texts and len(set(texts)) == len(texts) else "a list of values, each once"
    if not isinstance(domain, dict) or not {"low", "high"} <= domain.keys() <= RANGE:
        return f"found {domain!r}"
    low, high, step, log = domain["low"], domain["high"], domain.get("step"), domain.get("log", False)
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (low, high, step or 0)):
        return "low, high and step are numbers"
    if not low < high:
        return f"low {low} is not below high {high}"
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        return "log: true needs a low above 0 and has no step"
    return "step is above 0" if step is not None and step <= 0 else None


def _holds(domain: Any, value: Any) -> bool:
    """Whether a value is one that a key's domain has; for a range, whether it lies within."""
    if isinstance(domain, list):
        return value in domain
    return isinstance(value, (int, float)) and domain["low"] <= value <= domain["high"]


@dataclass
class Sweep:
    id: str | None  # of all experiments of the sweep: the tag sweep_id in MLflow
    target: str  # the stage that ends a point
    fixed: dict[str, Any]  # {key: value} of every point, as after -S
    grid: dict[str, Any]  # {key: [values]}: every combination is a point
    points: list[Any]  # [{key: value}]: points by themselves, beside those of the grid
    search: Search | None  # points that Optuna proposes, after those of `points`

    def __post_init__(self) -> None:
        is_name = self.id is None or NAME.fullmatch(self.id) is not None
        space = self.search.space if self.search else {}
        strangers = [
            f"{key}={value}"
            for one in self.points
            for key, value in one.items()
            if self.search and not (key in space and _holds(space[key], value))
        ]
        lists = [key for key, values in self.grid.items() if not isinstance(values, list) or not values]
        check_values(
            ("sweep.id", self.id, is_name, "null, or letters, digits, - and _"),
            ("sweep.grid", lists, not lists, "a list of at least one value for each key"),
            ("sweep.grid", self.grid, not (self.grid and self.search), "{} beside sweep.search"),
            ("sweep.points", strangers, not strangers, "values that sweep.search.space has"),
        )
