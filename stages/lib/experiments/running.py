"""Points of a sweep run by DVC: each `dvc exp run --temp` of its own, several at a time, with a log of each.

    repository --start_folder--> runs/sweeps/<id>/at-<hash>   --dvc exp run--> refs/exps/... --collect--> repository

DVC starts an experiment by stashing, resetting and detaching the tree it stands in. It does so in a copy: who edits a
file at that moment loses nothing, a kill at that moment breaks nothing, and all points run the code of the start.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.lib import environment, files, leases, live, stage, tracking
from stages.lib.errors import ConfigError, DataError, ExternalError
from stages.lib.experiments import kept
from stages.lib.experiments.points import Point, signatures
from stages.lib.schema.sweep import Sweep

Status = Literal["done", "failed", "killed", "pruned"]

POLL = 0.2  # seconds
PATIENCE = 60  # seconds between asking a point to end and ending it

_ending = threading.Event()


STARTED = "Reproducing experiment"  # what DVC says once an experiment has a folder of its own
INTERRUPTED = "the sweep was interrupted"


class Interrupted(Exception):
    """The sweep is to end: nothing new is started."""


@dataclass(frozen=True)
class Outcome:
    """How a point ended. reason: what it said, where it was not done. seconds: all in all."""

    point: Point
    status: Status
    reason: str
    log: Path
    seconds: float


def command(point: Point, sweep_id: str, target: str, more: Sequence[str] = ()) -> list[str]:
    """What a person would type to run this point. more: options of `dvc exp run` beside those every point has."""
    settings = [word for override in [*point.overrides(), f"sweep.id={sweep_id}"] for word in ("-S", override)]
    return ["dvc", "--wait-for-lock", "exp", "run", "--temp", "--name", point.name, *more, *settings, target]


def run(
    point: Point,
    sweep_id: str,
    target: str,
    *,
    source: Path | None = None,
    workers: int = 1,
    more: Sequence[str] = (),
) -> Outcome:
    """Run one point, wait for its end, and bring its experiment into the repository.

    A point that another driver runs at the moment is waited for. The outcome is also kept in <name>.json.

    Args: source: see `start_folder`; the repository as it is now by default.
    """
    started = time.monotonic()
    source = source or start_folder(sweep_id)
    place = folder(sweep_id)
    log = place / f"{point.name}.log"
    asked = None
    with _locked(place / f"{point.name}.lock", interruptible=True) as claim:
        collect(source, point.name)
        if point.name not in kept.references():
            live.forget(point.name)
            asked = _execute(command(point, sweep_id, target, more), source, log, claim, workers)
            collect(source, point.name)
    status: Status = "done"
    reason = ""
    if point.name not in kept.references():
        status, reason = ("killed", asked) if asked else ending(log.read_text(errors="replace"))
        if (told := live.heard(point.name)) and told.stopped_at is not None:
            status, reason = "pruned", f"stopped at step {told.stopped_at}, {told.reason}"
    outcome = Outcome(point, status, reason, log, time.monotonic() - started)
    record(outcome, place)
    return outcome


def record(outcome: Outcome, place: Path) -> None:
    """Keep an outcome in the folder of its sweep, for `outcomes`."""
    point = outcome.point
    found: dict[str, Any] = {"name": point.name, "values": point.values}
    found |= {"status": outcome.status, "reason": outcome.reason}
    found |= {"seconds": round(outcome.seconds, 1), "ended": time.time()}
    files.write_json(place / f"{point.name}.json", found)


def run_all(points: Sequence[Point], p: Sweep, *, workers: int) -> Iterator[Outcome]:
    """Run points, so many at a time; outcomes as they come. Who stops taking them ends the points that run.

    A point waits while another is at a stage that both share, so that the work is done once and then taken from DVC's
    cache; a point that shares nothing goes before it.
    """
    chain = [*tracking.upstream(p.target), p.target]
    shared = signatures(points, p.target)
    source = start_folder(str(p.id))
    waiting, running = list(points), dict[Future[Outcome], Point]()
    with pool(workers) as threads:
        while waiting or running:
            busy = {
                (name, shared[other.name][name])
                for other in running.values()
                for name in unfinished(folder(str(p.id)) / f"{other.name}.log", chain)
            }
            free = [point for point in waiting if busy.isdisjoint(shared[point.name].items())]
            if free and len(running) < workers:
                waiting.remove(free[0])
                running[start(threads, free[0], p, source=source, workers=workers)] = free[0]
                continue
            ended, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
            for each in ended:
                del running[each]
                yield each.result()


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to run points in. Whoever leaves it by an exception ends the points that run."""
    check(workers)
    try:
        with ThreadPoolExecutor(workers) as threads:
            try:
                yield threads
            except BaseException:
                _ending.set()  # the threads wait for the points that run
                raise
    finally:
        _ending.clear()


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end what runs here, and the points with it.

    A shell starts what it puts in the background with SIGINT ignored, and DVC would inherit that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def check(workers: int) -> None:
    """Raises: ConfigError, when no point is to run at a time."""
    if workers < 1:
        raise ConfigError(f"J (--workers): found {workers}, expected 1 or more points at a time")


def start(threads: ThreadPoolExecutor, point: Point, p: Sweep, *, source: Path, workers: int) -> Future[Outcome]:
    """Run a point in one of the threads.

    Its log of an earlier attempt goes, as it says nothing of this one, unless a driver that was killed left it at work.
    """
    if point.name not in at_work():
        (folder(str(p.id)) / f"{point.name}.log").unlink(missing_ok=True)
    return threads.submit(run, point, str(p.id), p.target, source=source, workers=workers)


def unfinished(log: Path, chain: Sequence[str]) -> list[str]:
    """The stages of a running point that it may still be at: all that its log does not name yet, and the last named."""
    said = log.read_text(errors="replace") if log.exists() else ""
    named = re.findall(r"^(?:Running s|S)tage '(\w+)'", said, re.MULTILINE)
    return [name for name in chain if name not in named[:-1]]


def _execute(words: list[str], source: Path, log: Path, claim: int, workers: int) -> str | None:
    """Run a command in the copy of the repository until it ends; INTERRUPTED, where it was ended before.

    One start after the other: DVC keeps what it starts in one place until it has a folder of its own.

    Args: claim: the point's lock. DVC inherits it, and goes on holding it should this process be killed.
    """
    variables = {"PIPELINE_ROOT": str(environment.root()), leases.WORKERS: str(workers)}
    with log.open("w") as said, _locked(source.with_suffix(".starting"), interruptible=True) as starting:
        restore(source)
        process = subprocess.Popen(
            words,
            cwd=source,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            pass_fds=(claim, starting),
            start_new_session=True,
        )
        is_starting = True
        try:
            while process.poll() is None:
                if is_starting and STARTED in log.read_text(errors="replace"):
                    fcntl.flock(starting, fcntl.LOCK_UN)  # also of what DVC inherited
                    is_starting = False
                if _ending.is_set():
                    return INTERRUPTED
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            _end(process)
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a point with its stages. DVC cleans up after SIGINT alone; stages end with the process they belong to."""
    for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # what DVC left when it was killed


@contextlib.contextmanager
def _locked(path: Path, *, interruptible: bool = False) -> Iterator[int]:
    """Hold a lock that processes started meanwhile can inherit; its descriptor.

    Raises: Interrupted, when the sweep is to end before something new is started.
    """
    with path.open("a") as file:
        while True:
            if interruptible and _ending.is_set():
                raise Interrupted
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL)
        yield file.fileno()


def ending(said: str) -> tuple[Status, str]:
    """Why a point is not there, from its log.

    qlora_train: lora.r: found 0, expected above 0
    ERROR: failed to reproduce 'qlora_train': failed to run: ..., exited with 2     ->  failed, the first line
    ERROR: failed to reproduce 'evaluate': failed to run: ..., exited with -9       ->  killed, evaluate: SIGKILL
    """
    lines = [line for line in said.splitlines() if line.strip()]
    faults = [i for i, line in enumerate(lines) if line.startswith("ERROR: ")]
    if not faults:  # DVC itself was killed
        return "killed", f"dvc ended without a word after {lines[-1]!r}" if lines else "said nothing"
    found = re.search(r"failed to reproduce '(\w+)'.*exited with (-?\d+)", lines[faults[0]])
    if not found:
        return "failed", " ".join(lines[faults[0] :])[7:500]
    name, status = found[1], int(found[2])
    number = -status if status < 0 else status - 128
    if 0 < number < signal.NSIG:
        return "killed", f"{name}: {signal.Signals(number).name}"
    own = [i for i, line in enumerate(lines[: faults[0]]) if line.startswith(f"{name}: ")]
    message = lines[own[-1] : faults[0]] if own else lines[max(0, faults[0] - 1) : faults[0]]
    return "failed", " ".join(message)[:500]


def start_folder(sweep_id: str) -> Path:
    """A clone of the repository with its tracked files as they are now, edits included; made where there is none yet.

    DVC's cache is the repository's own.
    """
    root = environment.root()
    if pointers := [name for name in _git(root, "ls-files", "-z", "*.dvc").split("\0") if name]:
        _check_data(root, pointers)
    head = _git(root, "rev-parse", "HEAD")
    edits = edits_of(root)
    tree = _git(root, "rev-parse", f"{edits or head}^{{tree}}")
    clone = folder(sweep_id) / f"at-{hashlib.sha256(f'{head} {tree}'.encode()).hexdigest()[:12]}"
    clone.parent.mkdir(parents=True, exist_ok=True)
    with _locked(clone.with_suffix(".making")):
        if not (clone / ".dvc/tmp/start.json").exists():
            shutil.rmtree(clone, ignore_errors=True)
            _git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(clone))
            _git(clone, "checkout", "--quiet", "--detach", head)
            for key in ("user.name", "user.email"):
                if value := _git(root, "config", "--get", key, check=False):
                    _git(clone, "config", key, value)
            local = root / ".dvc/config.local"
            if local.exists():
                shutil.copy2(local, clone / ".dvc")
            cache = ["dvc", "config", "--local", "cache.dir", str(stage.cache_dir(root))]
            subprocess.run(cache, cwd=clone, check=True, capture_output=True)
            files.write_json(clone / ".dvc/tmp/start.json", {"head": head, "edits": edits})
            restore(clone)
    return clone


def edits_of(root: Path) -> str:
    """A commit of the tracked files as they are now; empty where HEAD has them so."""
    _git(root, "update-index", "-q", "--refresh", check=False)  # in a repository that was copied, stash fails without
    return _git(root, "stash", "create")


def _check_data(root: Path, pointers: Sequence[str]) -> None:
    """Refuse data that changed since `dvc add`: the points would run on what was added.

    Raises: DataError, naming the files; ExternalError, when DVC cannot tell.
    """
    shown = subprocess.run(
        ["dvc", "status", "--json", *pointers], cwd=root, capture_output=True, text=True, check=False
    )
    if shown.returncode:
        raise ExternalError(f"dvc status {' '.join(pointers)}: {shown.stderr.strip()[-400:]}")
    if changed := [name for name in json.loads(shown.stdout or "{}") if (root / name.removesuffix(".dvc")).exists()]:
        added = " ".join(name.removesuffix(".dvc") for name in changed)
        raise DataError(f"{added}: changed since it was added, expected what its .dvc file names. `dvc add {added}`")


def restore(clone: Path) -> None:
    """Bring a copy back to how it was made: DVC, killed while it starts an experiment, leaves it reset or detached."""
    start = files.read_json(clone / ".dvc/tmp/start.json")
    (clone / ".git/index.lock").unlink(missing_ok=True)
    for left in ("refs/stash", "refs/exps/stash"):
        _git(clone, "update-ref", "-d", left)
    _git(clone, "checkout", "--quiet", "--force", "--detach", start["head"])
    _git(clone, "clean", "--quiet", "-fd")
    if start["edits"]:
        _git(clone, "stash", "apply", "--quiet", start["edits"])


def collect(clone: Path, name: str | None = None) -> None:
    """Bring the experiments that ended in a copy into the repository, under the same names.

    Args: name: one that nothing runs at the moment. Its experiment leaves the copy, so that it does not come back when
        the user removes it.
    """
    with _locked(clone.parent / "collecting"):
        there = [ref for ref in _experiments(clone) if ref.count("/") == 4]
        known = set(_experiments(environment.root()))
        if new := [f"{ref}:{ref}" for ref in there if ref not in known]:
            options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
            _git(environment.root(), "fetch", *options, str(clone), *new)
        for ref in there:
            if ref.split("/")[4] == name:
                _git(clone, "update-ref", "-d", ref)


def _experiments(place: Path) -> list[str]:
    return _git(place, "for-each-ref", "--format=%(refname)", "refs/exps").split()


def copies() -> list[Path]:
    """Those of `start_folder`, of all sweeps."""
    return [made.parents[2] for made in sorted(folder("").glob("*/at-*/.dvc/tmp/start.json"))]


def at_work(sweep_id: str = "*") -> list[str]:
    """Names of the points that run at the moment, of whichever driver; of all sweeps, if none is named."""
    found = []
    for path in sorted(folder("").glob(f"{sweep_id}/*.lock")):
        with path.open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
            continue
        found.append(path.stem)
    return found


def outcomes(sweep_id: str) -> list[dict[str, Any]]:
    """The last outcome of every point that was run here: name, values, status, reason, seconds, ended (Unix time)."""
    return [files.read_json(path) for path in sorted(folder(sweep_id).glob(f"{sweep_id}-*.json"))]


def folder(sweep_id: str) -> Path:
    """Where a sweep keeps its logs and its report: in the user's repository, git-ignored."""
    return environment.root() / "runs" / "sweeps" / sweep_id


def _git(place: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(["git", *arguments], cwd=place, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ExternalError(f"git {' '.join(arguments)} in {place}: {done.stderr.strip()}")
    return done.stdout.strip()
