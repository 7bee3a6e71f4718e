"""How much memory a piece of work, or a whole process, takes at its peak."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")
PROCESS = Path("/proc/self")


def peak_mib(work: Callable[[], Made]) -> tuple[Made, float | None]:
    """Do some work; its result, and the MiB it took at most above what was held before, on the graphics card too.

    None where the system does not count (Linux does: proc(5), clear_refs). Freed memory that the process kept counts
    as held before.
    """
    import torch

    gc.collect()
    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    card = torch.cuda.memory_allocated() if on_card else 0
    try:
        before = _held("VmRSS")
        (PROCESS / "clear_refs").write_text("5")  # the peak counts anew
    except OSError:
        return work(), None
    made = work()
    taken = _held("VmHWM") - before
    more = (torch.cuda.max_memory_allocated() - card) / 2**20 if on_card else 0.0
    return made, round(max(taken, 0.0) + more, 1)


def process_peak_mib() -> float:
    """The most this process held. Not getrusage's figure: that counts what it was started from, up to its exec."""
    return round(_held("VmHWM"), 1)


def _held(name: str) -> float:
    """MiB, of /proc/self/status."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
