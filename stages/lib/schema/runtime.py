"""conf/runtime: what cannot change a byte of output; no stage tracks it."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Engine(StrEnum):
    local = "local"
    ray = "ray"


@dataclass
class Runtime:
    threads: int | None  # null: all cores of the machine
    workers: int | None  # processes of the data stages; null: as many as cores
    engine: Engine  # what the data stages spread their work over
    ray_address: str | None  # null: RAY_ADDRESS, else a cluster started on this machine
    log_level: str
    tracking_uri: str | None  # null: MLFLOW_TRACKING_URI, else mlflow.db in the repository
    checkpoint_minutes: float  # between the points a training can go on from; 0: one at each step

    def __post_init__(self) -> None:
        check_values(
            ("runtime.threads", self.threads, self.threads is None or self.threads > 0, "null or at least 1"),
            ("runtime.workers", self.workers, self.workers is None or self.workers > 0, "null or at least 1"),
            ("runtime.checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes >= 0, "at least 0"),
        )
