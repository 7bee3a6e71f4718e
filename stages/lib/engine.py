"""What the data stages spread their work over: processes of this machine, or a Ray cluster. The results are the same.

A stage cuts its work into items whose boundaries depend on the data alone; `ordered_map` applies one function to each
and gives the results in the order of the items: nothing depends on how many workers there were, or which was first.

    items  1 2 3 4 5 ...      made one by one in this process, a few ahead
           | | |
    workers a b a ...         the function is sent to each once, the items as they come
           | | |
    results 1 2 3 ...         in order
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from stages.lib import leases
from stages.lib.errors import ExternalError
from stages.lib.schema.runtime import Engine, Runtime

Item = TypeVar("Item")
Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parents[2]
"""Where the package `stages` lies, and conf/ beside it."""

SINGLE_THREADED = {  # read by libraries while they are loaded: one worker a core is all the parallelism there is
    "OMP_NUM_THREADS": "1",  # numpy's and torch's products, Arrow's computing threads
    "ARROW_IO_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_runtime: Runtime | None = None
_function: Callable[[Any], Any]  # in a worker: what it applies


def start(runtime: Runtime) -> None:
    """Use these settings from now on in this process."""
    global _runtime
    _runtime = runtime


def workers() -> int:
    """Processes to work with: runtime.workers, else as many as this process's share of the cores."""
    asked = _runtime.workers or _runtime.threads if _runtime else None
    return asked or leases.cores()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 2) -> Iterator[Result]:
    """function(item) for each item, in order; at most `ahead` items a worker are held at once.

    A single item is worked on in this process.

    Args: function: importable by name, or a functools.partial of such a one; it must depend on its arguments alone, and
            reads no file but those under conf/. What a partial holds is sent to each worker once.
        items: things that can be pickled, made one by one while earlier ones are worked on.
    Raises: what function raises; ExternalError, when a worker was ended from outside.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    is_ray = _runtime is not None and _runtime.engine is Engine.ray
    if len(first) < 2 or (workers() == 1 and not is_ray):
        yield from map(function, items)
    elif _runtime is not None and is_ray:
        from stages.lib import engine_ray

        yield from engine_ray.ordered_map(function, items, _runtime.ray_address, ahead)
    else:
        yield from _over_processes(function, items, ahead)


def _over_processes(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """ordered_map over processes of this machine; none is left when it ends, however it ends."""
    others = set(multiprocessing.active_children())
    own: set[multiprocessing.process.BaseProcess] = set()
    waiting: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers(), mp_context=_forkserver(), initializer=_begin, initargs=(function,))
    try:
        for item in items:
            waiting.append(pool.submit(_work, item))
            own |= set(multiprocessing.active_children()) - others
            if len(waiting) >= workers() * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as fault:
        if fault.__cause__:  # a result that cannot be unpickled: a fault of ours
            raise
        pool.shutdown()
        raise ExternalError(ended(process.exitcode for process in own)) from None
    except BaseException:  # also of who takes the results, Ctrl-C and SIGTERM: nobody waits for what is still worked on
        for process in own:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def ended(statuses: Iterable[int | None]) -> str:
    """The message for workers of which one ended too early; the others were then stopped by SIGTERM."""
    found = [status for status in statuses if status not in (None, 0, -signal.SIGTERM)]
    status = found[0] if found else 0
    how = f"signal {signal.Signals(-status).name}" if status and status < 0 else f"status {status}"
    return (
        f"a worker process ended by {how} in the middle of its work, expected it to stay. SIGKILL comes mostly "
        "from the system, when memory runs out. "
        f"Set runtime.workers lower (now {workers()}) or free memory, and run again."
    )


def _forkserver() -> ForkServerContext:
    """Workers are forked from a process without threads (forking one with threads may hang) that has imported what this
    one has of the project, so that each starts within milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_imported())
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with environment({**SINGLE_THREADED, "PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


def _imported() -> list[str]:
    """The project's modules that this process has imported."""
    return sorted(name for name in sys.modules if name.startswith("stages."))


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the processes started in this block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin(function: Callable[[Any], Any]) -> None:
    """What a worker does first: Ctrl-C is for the parent, which ends its workers; and without a parent, so do they."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _function(item)
