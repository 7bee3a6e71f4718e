"""conf/sweep: what ties experiments together; no stage tracks it."""

from dataclasses import dataclass


@dataclass
class Sweep:
    id: str | None  # becomes the tag sweep_id in MLflow
