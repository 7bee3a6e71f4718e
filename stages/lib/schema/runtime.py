"""conf/runtime: what cannot change a byte of output; no stage tracks it."""

from dataclasses import dataclass

from stages.lib.errors import check_values


@dataclass
class Runtime:
    threads: int | None  # null: all cores of the machine
    log_level: str
    tracking_uri: str | None  # null: MLFLOW_TRACKING_URI, else mlflow.db in the repository

    def __post_init__(self) -> None:
        check_values(("runtime.threads", self.threads, self.threads is None or self.threads > 0, "null or at least 1"))
