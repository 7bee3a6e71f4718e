"""The frame around every stage: typed parameters, arithmetic settled, one MLflow run, faults as one message."""

import ctypes
import dataclasses
import errno
import functools
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import yaml

from stages.lib import config, environment, files, leases, numerics, tracking
from stages.lib.errors import PipelineError
from stages.lib.schema.numerics import Device
from stages.lib.schema.runtime import Launcher, Runtime

P = TypeVar("P")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NO_SPACE = "No space left on device"  # also how native libraries word ENOSPC


@dataclasses.dataclass
class Outside:
    """The section that no stage tracks and all read."""

    runtime: Runtime


def run(
    name: str, main: Callable[[P], None], params: type[P], *, start: Callable[[Runtime], None] | None = None
) -> None:
    """Run a stage's main with its typed parameters; end the process with one message where the user can mend the fault.

    Args: start: given the runtime section before main; engine.start, for a stage that spreads its work.
    Exit status: 0 done; 2 a fault the message explains; 143 ended by SIGTERM; a traceback only for a fault of our own.
    """
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _terminated)
    if "DVC_STAGE" in os.environ:  # nobody would take what an orphan of DVC makes
        end_with_parent(signal.SIGTERM)
    try:
        p = config.load(params, sys.argv[1:])
        outside = config.load(Outside, sys.argv[1:])
        quiet(outside.runtime.log_level)
        if start:
            start(outside.runtime)
        if any(field.name == "numerics" for field in dataclasses.fields(cast(Any, params))):
            os.environ["HF_HUB_OFFLINE"] = "1"
            if wanted := gpus(p, outside.runtime):
                leases.hold_devices(wanted)
            tracking.measured |= numerics.settle(cast(Any, p).numerics, outside.runtime.threads)
        with tracking.run(name, config.values(sys.argv[1:])):
            main(p)
            tracking.measured |= {"wall_s": round(time.monotonic() - started, 2), "peak_mib": peak_mib()}
    except PipelineError as fault:
        sys.exit(_message(name, str(fault)))
    except Exception as fault:
        if not (isinstance(fault, OSError) and fault.errno == errno.ENOSPC) and NO_SPACE not in str(fault):
            print(restoration(name), file=sys.stderr)
            raise
        advice = "The disk is full; nothing half-written was kept. Free some of it (`make clean`) and run again."
        sys.exit(_message(name, f"{fault}\n{advice}"))


def gpus(p: Any, runtime: Runtime) -> int:
    """How many GPUs a stage computes on: one, for a training one each of its processes; those of Ray are Ray's to give.

    Args: p: its parameters, which have a section numerics.
    """
    if p.numerics.device is Device.cpu:
        return 0
    if not hasattr(p, "train"):
        return 1
    return 0 if runtime.launcher is Launcher.ray else int(p.train.processes)


def quiet(level: str) -> None:
    """Show our own messages from runtime.log_level on; of the libraries only what a user can act on."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stages").setLevel(level.upper())
    # renamed arguments of transformers 5.23 that TRL 1.16 still passes by their old names: for their developers
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _message(name: str, fault: str) -> int:
    print("\n".join(line for line in (f"{name}: {fault}", restoration(name)) if line), file=sys.stderr)
    return 2


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise tracking.Killed(128 + number)


def end_with_parent(number: signal.Signals) -> None:
    """Let the system send this process a signal when the one that started it ends first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def restoration(name: str) -> str:
    """How to get back the outputs that DVC removed before it started the stage; empty where nothing can be had."""
    if os.environ.get("DVC_STAGE") != name or environment.root() != Path.cwd():
        return ""
    outs = tracking.paths(yaml.safe_load(Path("dvc.yaml").read_text())["stages"], name, "outs")
    here = Path("dvc.lock").read_text() if Path("dvc.lock").exists() else ""
    last = subprocess.run(["git", "show", "HEAD:dvc.lock"], capture_output=True, text=True, check=False).stdout
    for lock, command in ((here, "dvc checkout"), (last, "git checkout dvc.lock && dvc checkout")):
        if f"\n  {name}:" in lock:
            recorded = [out for out in yaml.safe_load(lock)["stages"][name]["outs"] if out["path"] in outs]
            if not recorded or not all(cached(out["md5"]) for out in recorded):
                return ""
            return (
                f"DVC removed the outputs of {name} before it started; the last ones are in its cache. "
                f"To get them back: {command} {name}"
            )
    return ""


def cached(md5: str) -> dict[str, Path]:
    """Where the files of an output lie in DVC's cache, by their paths in it (`.` for a file); empty if one is missing.

    Args: md5: as dvc.lock has it; a folder's ends with `.dir` and names a JSON list of its files.
    """
    cache = cache_dir(Path.cwd()) / "files/md5"
    place = cache / md5[:2] / md5[2:]
    found = {".": place}
    if md5.endswith(".dir") and place.exists():
        members = files.read_json(place)
        found = {member["relpath"]: cache / member["md5"][:2] / member["md5"][2:] for member in members}
    return found if all(path.exists() for path in found.values()) else {}


@functools.cache
def cache_dir(repository: Path) -> Path:
    """Where DVC keeps what it caches: cache.dir of its configuration, or .dvc/cache."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    shown = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False).stdout.strip()
    return Path(shown)


def peak_mib() -> int:
    """Peak resident memory of this process and of its largest finished child, MiB (Linux counts in KiB)."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
