"""How far a long step is: a bar with the rate on a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS = 30
log = logging.getLogger(__name__)


def rows(
    items: Iterable[Item], total: int | None = None, *, what: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """The same items, counted on stderr as they come by.

    Args: total: rows to come, where known. what: the step, for the reader. size: rows in an item.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=" rows", unit_scale=True, file=sys.stderr) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        if (now := time.monotonic()) - shown >= SECONDS:
            shown = now
            log.info(
                "%s: %s%s rows, %.0f rows/s", what, f"{done:,}", f" of {total:,}" if total else "", done / (now - start)
            )
