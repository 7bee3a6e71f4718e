"""A training in several processes: one function for all, in this process, under torchrun, or under Ray Train.

    launch(function, ...)     the stage: holds the MLflow run, writes metrics and plots
      |-- rank 0: function    prints, saves points to go on from, writes the adapter; its result comes back
      |-- rank 1: function    silent
      ...

How many there are changes what is computed (train.processes); what starts them does not (runtime.launcher).
"""

import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.lib import checkpoints, engine, leases, stage, tracking
from stages.lib.errors import ExternalError, PipelineError
from stages.lib.schema.runtime import Launcher, Runtime, check_launcher

_runtime: Runtime | None = None


@dataclass(frozen=True)
class Job:
    """What each process is told; it travels pickled. The function is named, for it may stand in the main module."""

    module: str
    function: str
    arguments: tuple[Any, ...]
    folder: str  # to work in
    processes: int
    device: str
    runtime: Runtime
    run: tuple[str, str] | None  # MLflow's address and the id of the run to add to


def start(runtime: Runtime) -> None:
    """Launch, and save points to go on from, as configured here, from now on in this process."""
    global _runtime
    _runtime = runtime
    checkpoints.start(runtime)


def launch(function: Callable[..., Any], *arguments: Any, processes: int, device: str) -> Any:
    """What function(*arguments) returns in rank 0, when all processes have ended.

    Args: function: importable by name; every process calls it, and torch.distributed tells it who it is.
        device: that the processes compute on, cpu or cuda.
    Raises: what function raises for the user to mend; ConfigError, when the launcher is local; ExternalError,
        when a process was ended from outside.
    """
    if _runtime is None or (_runtime.launcher is Launcher.local and processes == 1):
        return function(*arguments)
    check_launcher(_runtime.launcher, processes)
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec and function.__module__ == "__main__" else function.__module__
    job = Job(module, function.__name__, arguments, os.getcwd(), processes, device, _runtime, run=tracking.open_run())
    path = os.pathsep.join(filter(None, [str(engine.REPOSITORY), os.environ.get("PYTHONPATH")]))
    shared = str(leases.even(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))), processes))
    with engine.environment({"PYTHONPATH": path, "OMP_NUM_THREADS": shared, "MKL_NUM_THREADS": shared}):
        if _runtime.launcher is Launcher.ray:
            from stages.lib import launching_ray

            return launching_ray.run(job)
        return _torchrun(job)


def is_first() -> bool:
    """Is this the process that writes? The only one is."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def _torchrun(job: Job) -> Any:
    """Let torchrun's agent start the processes on this machine, and wait for them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # what is raised here
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "job").write_bytes(pickle.dumps(job))
        agent = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.processes,
            run_id=Path(scratch).name,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(scratch) / "logs")),
            signals_to_handle="SIGHUP",  # SIGTERM and Ctrl-C stay with the stage
        )
        try:
            elastic_launch(agent, sys.executable)("-m", __name__, scratch, str(os.getpid()))
        except ChildFailedError as failed:
            raise _fault(Path(scratch), {rank: f.exitcode for rank, f in failed.failures.items()}) from None
        except SignalException as fault:
            raise tracking.Killed(128 + fault.sigval) from None
        return pickle.loads((Path(scratch) / "result").read_bytes())


def _fault(scratch: Path, statuses: dict[int, int]) -> Exception:
    """Why the processes failed: what one of them raised, or the signal that ended it. The others then fail, too."""
    for told in sorted(scratch.glob("fault-*")):
        fault: Exception = pickle.loads(told.read_bytes())
        return fault
    for rank, status in sorted(statuses.items()):
        if status < 0 and status != -signal.SIGTERM:  # by which the agent ends the others
            return ended(rank, f"by signal {signal.Signals(-status).name}")
    rank, status = min(statuses.items())
    return ended(rank, f"with status {status}; its traceback stands above")


def ended(rank: int, how: str) -> ExternalError:
    """The message for a process that did not come to its end."""
    return ExternalError(
        f"process {rank} of train.processes ended {how}, expected it to stay. SIGKILL comes mostly from the system, "
        "when memory runs out: each process holds the whole model unless train.sharding=fsdp. Run again to go on from "
        "the last point that was saved."
    )


def main(scratch: str, parent: str) -> int:
    """One process under torchrun: take part in the job that lies in a folder, and leave result or fault there."""
    import torch
    from torch import distributed

    stage.end_with_parent(signal.SIGKILL)
    if os.getppid() != int(parent):
        return 1
    rank, folder = int(os.environ["RANK"]), Path(scratch)
    job: Job = pickle.loads((folder / "job").read_bytes())
    if job.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if job.device == "cuda" else "gloo")
    try:
        result = take_part(job, rank)
    except (PipelineError, OSError) as fault:
        (folder / f"fault-{rank}").write_bytes(pickle.dumps(fault))
        return 2
    except RuntimeError as fault:
        if "gloo" in str(fault) or isinstance(fault, distributed.DistError):
            return 1  # another process has ended, and the launcher says which
        raise
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))
    distributed.destroy_process_group()
    return 0


def take_part(job: Job, rank: int) -> Any:
    """Call the job's function, as what the stage's own process would be in rank 0, and silently in the others."""
    os.chdir(job.folder)
    stage.quiet(job.runtime.log_level)
    start(job.runtime)
    if rank:
        sys.stdout = open(os.devnull, "w")  # as long as the process lives
        logging.disable(logging.WARNING)
    elif job.run:
        tracking.join_run(*job.run)
    return getattr(import_module(job.module), job.function)(*job.arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
