"""The processes of a training as workers of Ray Train; a module of its own, for Ray is an extra.

The nodes share the file system that the working folder and the repository lie on: each worker reads the base and the
packs there, rank 0 saves and writes there. The code of the stage is sent along.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.lib import engine_ray, environment, launching
from stages.lib.errors import ExternalError, PipelineError

import ray  # isort: skip  # after engine_ray, which switches its usage statistics off
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

HANDED_ON = (  # what decides arithmetic, paths and whose training it is, for workers that the stage did not start
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DVC_EXP_NAME",
    "DVC_ROOT",
    "GOMP_SPINCOUNT",
    "HF_HUB_OFFLINE",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PIPELINE_ROOT",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
)

SECONDS = 0.5  # between two looks at what the first process has printed


def run(job: launching.Job) -> Any:
    """launching.launch under Ray Train: one GPU a worker, or on CPUs its threads.

    Raises: as launching.launch; ExternalError, also when no cluster answers.
    """
    cores = int(os.environ["OMP_NUM_THREADS"])
    engine_ray.connect(job.runtime.ray_address, cpus=cores * job.processes)
    handed_on = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    (environment.root() / "runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir=environment.root() / "runs") as storage:  # Ray Train looks for it on every node
        said = Path(storage) / "said"
        said.touch()
        trainer = TorchTrainer(
            _take_part,
            train_loop_config={"job": job, "said": str(said)},
            torch_config=TorchConfig(backend="nccl" if job.device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=job.processes, use_gpu=job.device == "cuda", resources_per_worker={"CPU": cores}
            ),
            run_config=RunConfig(
                name="training",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": handed_on | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            ),
        )
        try:
            with _shown(said):
                return trainer.fit().return_value
        except WorkerGroupError as failed:
            raise _fault(failed) from failed
        except (TrainingFailedError, RayError) as failed:
            raise ExternalError(
                f"Ray Train could not run the training, expected {job.processes} workers: {str(failed).strip()}. See "
                "`ray status`, or change runtime.ray_address or train.processes."
            ) from failed


@contextmanager
def _shown(said: Path) -> Iterator[None]:
    """Show what the first process prints, as it comes; Ray's own way would show what all its actors print."""
    is_over = threading.Event()

    def follow() -> None:
        with said.open() as lines:
            is_last = False
            while not is_last:
                is_last = is_over.wait(SECONDS)
                print(lines.read(), end="", flush=True)

    following = threading.Thread(target=follow)
    following.start()
    try:
        yield
    finally:
        is_over.set()
        following.join()


def _take_part(config: dict[str, Any]) -> Any:
    """In a worker."""
    job: launching.Job = config["job"]
    if not Path(job.folder).is_dir():
        raise ExternalError(
            f"node {ray.util.get_node_ip_address()} has no folder {job.folder}, expected the one that the stage runs "
            "in: runtime.launcher=ray needs a file system that all nodes share. See docs/cluster.md."
        )
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        logging.getLogger().handlers.clear()  # Ray's, which show all that libraries log
        sys.stdout = sys.stderr = open(config["said"], "a", buffering=1)  # as long as the worker lives
    return launching.take_part(job, rank)


def _fault(failed: WorkerGroupError) -> Exception:
    """What one of the workers raised for the user to mend, or that one was lost."""
    for _, raised in sorted(failed.worker_failures.items()):
        seen: BaseException | None = raised
        while seen is not None:
            if isinstance(seen, PipelineError | OSError):
                return seen
            seen = seen.__cause__ or getattr(seen, "cause", None)
    rank, raised = min(failed.worker_failures.items())
    return launching.ended(rank, f"under Ray Train: {str(raised).strip()}")
