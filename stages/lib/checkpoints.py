"""Resume points of a training: whole or not there, found again by all that determines the result, gone after success.

    .checkpoints/<key>/run-0/step-00000120/   what the training wrote, and complete.json: the sha256 of each file
                            /step-00000160/   the newest two are kept
                            /lock             held while a training uses run-0; a second one of equal key makes run-1

They lie in the user's repository, not in an output: DVC empties outputs before a stage starts, and deletes the copy of
the repository in which a queued experiment ran.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from stages.lib import environment, files, tracking
from stages.lib.schema.runtime import Runtime

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
"""Where dvc.yaml lies beside the code that runs."""

KEPT = 2
MARK = "complete.json"

_minutes = math.inf


def start(runtime: Runtime) -> None:
    """Save as often as runtime.checkpoint_minutes says from now on in this process; before, at evaluations alone."""
    global _minutes
    _minutes = runtime.checkpoint_minutes


def key(stage: str, determining: Mapping[str, Any], *, without: Collection[str] = ()) -> str:
    """Name of a stage's run: a hash of what is given and of all that dvc.yaml lists as its deps: data, code, lock.

    Args: without: deps that do not count.
    """
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    read = {dep: _content(Path(dep)) for dep in tracking.paths(stages, stage, "deps") if dep not in without}
    held = json.dumps([determining, read], sort_keys=True, default=str)
    return hashlib.sha256(held.encode()).hexdigest()[:16]


def _content(path: Path) -> Any:
    """The sha256 of a file, or of each file of a folder; None where there is nothing."""
    if path.is_dir():
        return {str(file.relative_to(path)): files.sha256(file) for file in path.rglob("*") if file.is_file()}
    return files.sha256(path) if path.is_file() else None


def folder() -> Path:
    return environment.root() / ".checkpoints"


class Checkpoints:
    """The resume points of one training in a folder that no other process uses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= 60 * _minutes

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder, and count it as a point once every byte is on the disk.

        A disk that is full, or any other fault of writing, costs this point and a warning, not the training.
        """
        new, point = self.folder / "new.partial", self.folder / f"step-{step:08d}"
        try:
            _remove(new)
            new.mkdir(parents=True)
            write(new)
            digests = {file.name: files.sha256(file) for file in sorted(new.iterdir())}
            (new / MARK).write_text(json.dumps(digests, indent=2))
            for path in (*new.iterdir(), new):
                _sync(path)
            _remove(point)
            new.rename(point)
            _sync(self.folder)
            for old in self._points()[KEPT:]:
                _remove(old)
        except Exception as fault:  # torch and safetensors each have their own word for a full disk
            log.warning("%s: not saved (%s: %s). The training goes on without.", point, type(fault).__name__, fault)
            shutil.rmtree(new, ignore_errors=True)
        self._last = time.monotonic()

    def newest(self) -> Path | None:
        """The last point that is whole; torn ones after it are removed, with a line that says why."""
        for point in self._points():
            if not (fault := _fault(point)):
                return point
            log.warning("%s: skipped, %s. The one before is tried.", point, fault)
            _remove(point)
        return None

    def remove(self) -> None:
        """Delete all points: the result they led to is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _points(self) -> list[Path]:
        """Last step first."""
        return sorted(self.folder.glob("step-*"), reverse=True)


@contextmanager
def claimed(key: str) -> Iterator[Checkpoints]:
    """The resume points of a training for this process alone: those a killed run left, the farthest first, or none yet.

    A run of equal key that is still going keeps its own; neither sees the other's.
    """
    place = folder() / key
    while True:
        left = sorted(place.glob("run-*"), key=lambda run: (_step(run), run.name), reverse=True)
        another = next(run for i in itertools.count() if not (run := place / f"run-{i}").exists())
        for run in (*left, another):
            if lock := _locked(run):
                try:
                    yield Checkpoints(run)
                finally:
                    lock.release()
                    if not any(run.glob("step-*")):
                        shutil.rmtree(run, ignore_errors=True)
                    _remove_empty(place)
                return


def _step(run: Path) -> str:
    return max((point.name for point in run.glob("step-*")), default="")


def _locked(run: Path) -> FileLock | None:
    """The lock of one run's folder, held; None while another process holds it."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / "lock", timeout=0)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):  # in use, or removed by a run that has just ended
        return None
    return lock


def sweep() -> list[Path]:
    """Delete the points of runs that are gone and were never continued; returns the folders deleted."""
    found = []
    for run in sorted(folder().glob("*/run-*")):
        if lock := _locked(run):
            shutil.rmtree(run)
            lock.release()
            found.append(run)
            _remove_empty(run.parent)
    return found


def _fault(point: Path) -> str | None:
    """Why a point is not as it was written; None when it is."""
    try:
        expected = json.loads((point / MARK).read_text())
    except (OSError, ValueError) as fault:
        return f"{MARK} cannot be read ({type(fault).__name__})"
    for name, digest in expected.items():
        if not (point / name).is_file():
            return f"{name} is missing"
        if files.sha256(point / name) != digest:
            return f"{name} holds other bytes than were written"
    return None


def _sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _remove_empty(place: Path) -> None:
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
