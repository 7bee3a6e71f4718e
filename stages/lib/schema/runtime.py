"""conf/runtime: what cannot change a byte of output; no stage tracks it."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import ConfigError, check_values


class Engine(StrEnum):
    local = "local"
    ray = "ray"


class Launcher(StrEnum):
    """How the processes of a training are started; the same ones give the same bytes."""

    local = "local"  # the stage's own process
    torchrun = "torchrun"  # processes of this machine
    ray = "ray"  # workers of a Ray cluster whose nodes share a file system


@dataclass
class Runtime:
    threads: int | None  # null: all cores of the machine
    workers: int | None  # processes of the data stages; null: as many as cores
    engine: Engine  # what the data stages spread their work over
    ray_address: str | None  # null: RAY_ADDRESS, else a cluster started on this machine
    log_level: str
    tracking_uri: str | None  # null: MLFLOW_TRACKING_URI, else mlflow.db in the repository
    checkpoint_minutes: float  # between the points a training can go on from; 0: one at each step
    launcher: Launcher = Launcher.local  # of train.processes

    def __post_init__(self) -> None:
        check_values(
            ("runtime.threads", self.threads, self.threads is None or self.threads > 0, "null or at least 1"),
            ("runtime.workers", self.workers, self.workers is None or self.workers > 0, "null or at least 1"),
            ("runtime.checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes >= 0, "at least 0"),
        )


def check_launcher(launcher: Launcher, processes: int) -> None:
    """Raise ConfigError when the launcher cannot start so many processes for a training."""
    if launcher is Launcher.local and processes > 1:
        raise ConfigError(
            f"runtime.launcher: found local with train.processes={processes}, expected torchrun for processes of this "
            "machine, or ray for workers of a cluster; local is for train.processes=1."
        )
