"""What a stage may use of the machine while others run beside it: GPUs of its own, and its share of the cores.

A device is leased by binding a name in Linux's abstract socket namespace. The system knows each name once on a machine,
whichever repository or clone asks, and frees it when the process ends, however it ends: nothing is left to clean up.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from stages.lib.errors import ConfigError

log = logging.getLogger(__name__)

WORKERS = "PIPELINE_WORKERS"  # how many points of a sweep run at a time on this machine
VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[socket.socket] = []  # as long as this process lives


def at_once() -> int:
    """How many experiments share this machine: as the driver of a sweep says, or as `dvc queue start -j` started."""
    asked = os.environ.get(WORKERS)
    return max(1, int(asked)) if asked else max(1, _queue_workers())


def _queue_workers() -> int:
    """Workers of `dvc queue start` of which one runs this process, itself among them; 0 where none does."""
    if "DVC_EXP_NAME" not in os.environ:
        return 0
    import psutil

    own = [queue for parent in psutil.Process().parents() if (queue := queue_of(_command(parent)))]
    return sum(queue_of(_command(process)) == own[0] for process in psutil.process_iter()) if own else 0


def queue_of(command: Sequence[str]) -> str | None:
    """The queue a process serves: [python, dvc, exp, queue-worker, dvc-exp-50b0e4-2@localhost] -> dvc-exp-50b0e4."""
    return command[4].rpartition("-")[0] if list(command[2:4]) == ["exp", "queue-worker"] else None


def _command(process: Any) -> list[str]:
    """What a process was started with; nothing when it has gone meanwhile, or is somebody else's."""
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def cores() -> int:
    """Cores of this process's share: those it may run on, divided among what runs at a time."""
    return max(1, len(os.sched_getaffinity(0)) // at_once())


def threads() -> int:
    """Threads of the arithmetic for this process's share of the cores."""
    return even(cores(), 1)


def even(cores: int, among: int) -> int:
    """Threads for each of several processes: the largest power of two in its share of the cores.

    Sums split among 3 threads end in other last bits than those among 1, 2, 4 or 8.
    """
    return 1 << (max(1, cores // among).bit_length() - 1)


def hold_devices(wanted: int, devices: Sequence[str] | None = None, *, poll: float = 1.0) -> list[str]:
    """Lease GPUs until this process ends, and show CUDA these alone; waits while others hold too many.

    Args: wanted: how many. devices: among which, by UUID; those that `visible` finds by default.
    Returns: the leased ones; none on a machine without a GPU.
    Raises: ConfigError, when there never will be as many.
    """
    among = visible() if devices is None else list(devices)
    if not among:
        return []
    if wanted > len(among):
        raise ConfigError(
            f"train.processes: found {wanted}, expected at most {len(among)}, the GPUs of this machine ({VISIBLE})."
        )
    taken = _take(wanted, among)
    if not taken:
        log.info("all GPUs (%d) are at work for other stages; waiting for %d", len(among), wanted)
    while not taken:
        time.sleep(poll)
        taken = _take(wanted, among)
    _held.extend(taken.values())
    os.environ[VISIBLE] = ",".join(taken)
    return list(taken)


def _take(wanted: int, among: Sequence[str]) -> dict[str, socket.socket]:
    """As many leases as wanted, or none: who waits holds nothing that another waits for."""
    taken: dict[str, socket.socket] = {}
    for device in among:
        if len(taken) < wanted and (lease := _lease(device)):
            taken[device] = lease
    if len(taken) < wanted:
        for lease in taken.values():
            lease.close()
        return {}
    return taken


def _lease(device: str) -> socket.socket | None:
    """The lease of one device; None while another process has it."""
    lease = socket.socket(socket.AF_UNIX)
    try:
        lease.bind(f"\0pipeline-device-{device}")
    except OSError:
        lease.close()
        return None
    return lease


def visible() -> list[str]:
    """UUIDs of the GPUs this process may use, or of their parts (MIG), without loading torch."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no card
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [parts if (parts := _parts(handle)) else [_uuid(handle)] for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    asked = os.environ.get(VISIBLE)
    return [uuid for card in found for uuid in card] if asked is None else chosen(asked, found)


def chosen(asked: str, cards: Sequence[Sequence[str]]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES chooses, by number or by how a UUID begins; as CUDA does, up to the first unknown.

    Args: cards: of each card its UUID, or those of its parts.
    """
    names: list[str] = []
    for word in filter(None, (word.strip() for word in asked.split(","))):
        if word.isdigit():
            found = list(cards[int(word)]) if int(word) < len(cards) else []
        else:
            found = [uuid for card in cards for uuid in card if uuid.startswith(word)][:1]
        if not found:
            break
        names += found
    return names


def _parts(card: Any) -> list[str]:
    """UUIDs of the parts a card is divided into; none where it is whole."""
    import pynvml

    try:
        if pynvml.nvmlDeviceGetMigMode(card)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(card)
    except pynvml.NVMLError:  # a card that cannot be divided
        return []
    parts = []
    for i in range(count):
        try:
            parts.append(_uuid(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, i)))
        except pynvml.NVMLError:  # numbers without a part
            continue
    return parts


def _uuid(handle: Any) -> str:
    import pynvml

    uuid = pynvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else uuid
