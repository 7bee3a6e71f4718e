"""conf/sweep: what ties experiments together, and the points a sweep consists of; no stage tracks it."""

import re
from dataclasses import dataclass
from typing import Any

from stages.lib.errors import check_values

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass
class Sweep:
    id: str | None  # of all experiments of the sweep: the tag sweep_id in MLflow
    target: str  # the stage that ends a point
    fixed: dict[str, Any]  # {key: value} of every point, as after -S
    grid: dict[str, Any]  # {key: [values]}: every combination is a point
    points: list[Any]  # [{key: value}]: points by themselves, beside those of the grid
    search: dict[str, Any] | None  # points that Optuna proposes

    def __post_init__(self) -> None:
        is_name = self.id is None or NAME.fullmatch(self.id) is not None
        lists = [key for key, values in self.grid.items() if not isinstance(values, list) or not values]
        check_values(
            ("sweep.id", self.id, is_name, "null, or letters, digits, - and _"),
            ("sweep.grid", lists, not lists, "a list of at least one value for each key"),
        )
