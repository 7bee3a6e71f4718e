"""What the data stages spread their work over: processes of this machine, or a Ray cluster. The results are the same.

A stage cuts its work into items whose boundaries depend on the data alone; `ordered_map` applies one function to each and
gives the results in the order of the items, so that nothing depends on how many workers there were or which was first.
"""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from stages.lib.schema.runtime import Engine, Runtime

Item = TypeVar("Item")
Result = TypeVar("Result")

_runtime: Runtime | None = None


def start(runtime: Runtime) -> None:
    """Use these settings from now on in this process."""
    global _runtime
    _runtime = runtime


def workers() -> int:
    """Processes to work with: runtime.workers, else as many as cores this process may run on."""
    asked = _runtime.workers or _runtime.threads if _runtime else None
    return asked or len(os.sched_getaffinity(0))


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 2) -> Iterator[Result]:
    """function(item) for each item, in order; at most `ahead` items a worker are held at once.

    Args: function: importable by name, or a functools.partial of such a one; it must depend on its arguments alone.
        items: things that can be pickled, made one by one while earlier ones are worked on.
    Raises: what function raises.
    """
    if _runtime and _runtime.engine is Engine.ray:
        from stages.lib import engine_ray

        yield from engine_ray.ordered_map(function, items, _runtime.ray_address, workers() * ahead)
        return
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if workers() == 1 or len(first) < 2:
        yield from map(function, itertools.chain(first, items))
        return
    context = multiprocessing.get_context("forkserver")  # forking a process with threads may hang
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers(), mp_context=context) as pool:
        try:
            for item in itertools.chain(first, items):
                waiting.append(pool.submit(function, item))
                if len(waiting) >= workers() * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
