"""Points of a sweep run by DVC: each `dvc exp run --temp` of its own, several at a time, with a log of each."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.lib import environment
from stages.lib.experiments.points import Point
from stages.lib.schema.sweep import Sweep

WORKERS = "PIPELINE_WORKERS"  # how many points run at a time: stages divide the cores by it


@dataclass(frozen=True)
class Outcome:
    """How a point ended. reason: the last line of what it said, where it was not done. seconds: all in all."""

    point: Point
    status: Literal["done", "failed", "killed"]
    reason: str
    log: Path
    seconds: float


def command(point: Point, sweep_id: str, target: str, more: Sequence[str] = ()) -> list[str]:
    """What a person would type to run this point. more: options of `dvc exp run` beside those every point has."""
    settings = [word for override in [*point.overrides(), f"sweep.id={sweep_id}"] for word in ("-S", override)]
    return ["dvc", "exp", "run", "--temp", "--name", point.name, *more, *settings, target]


def run(point: Point, sweep_id: str, target: str, *, workers: int = 1, more: Sequence[str] = ()) -> Outcome:
    """Run one point in a temporary copy of the repository and wait for its end."""
    started = time.monotonic()
    log = folder(sweep_id) / f"{point.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        done = subprocess.run(
            command(point, sweep_id, target, more),
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, WORKERS: str(workers)},
            check=False,
        )
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status: Literal["done", "failed", "killed"] = (
        "done" if done.returncode == 0 else "killed" if done.returncode < 0 else "failed"
    )
    reason = "" if status == "done" else lines[-1] if lines else f"exit status {done.returncode}"
    return Outcome(point, status, reason, log, time.monotonic() - started)


def run_all(points: Sequence[Point], p: Sweep, *, workers: int) -> Iterator[Outcome]:
    """Run points, so many at a time; outcomes as they come."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(run, point, str(p.id), p.target, workers=workers) for point in points]
        for each in as_completed(waiting):
            yield each.result()


def folder(sweep_id: str) -> Path:
    """Where a sweep keeps its logs and its report: in the user's repository, git-ignored."""
    return environment.root() / "runs" / "sweeps" / sweep_id
