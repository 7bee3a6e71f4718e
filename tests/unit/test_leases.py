"""What a stage may use of the machine while others run beside it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from stages.lib import leases
from stages.lib.errors import ConfigError
from tests.conftest import ROOT

HOLD = """
import sys, time
from stages.lib import leases
print(leases.hold_devices(int(sys.argv[1]), sys.argv[2].split(","), poll=0.01), flush=True)
time.sleep(60)
"""


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two devices that no other test knows; what this process leased is free afterwards."""
    monkeypatch.setenv(leases.VISIBLE, "")
    monkeypatch.setattr(leases, "_held", [])
    yield [f"GPU-{uuid4()}" for _ in range(2)]
    for lease in leases._held:
        lease.close()


def holder(wanted: int, cards: list[str]) -> subprocess.Popen[str]:
    """Another process that leases devices and keeps them."""
    command = [sys.executable, "-c", HOLD, str(wanted), ",".join(cards)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_never_share_a_device_and_a_killed_one_leaves_its_own_free(cards: list[str]) -> None:
    with holder(1, cards) as other:
        try:
            assert told(other) == str(cards[:1])
            assert leases.hold_devices(1, cards) == cards[1:]
            assert os.environ[leases.VISIBLE] == cards[1]
            other.kill()
            other.wait()
            assert leases.hold_devices(1, cards) == cards[:1]
        finally:
            other.kill()


def test_who_finds_all_devices_taken_waits_for_one(cards: list[str]) -> None:
    leases.hold_devices(2, cards)
    with holder(1, cards) as other:
        try:
            time.sleep(0.3)
            leases._held.pop().close()
            assert told(other) == str(cards[1:])
        finally:
            other.kill()


def test_who_waits_for_two_devices_holds_none_of_them(cards: list[str]) -> None:
    leases.hold_devices(1, cards)
    assert leases._take(2, cards) == {}
    assert leases.hold_devices(1, cards) == cards[1:]


def test_more_devices_than_there_are_are_refused_and_none_are_needed_without_a_card(cards: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.processes: found 3, expected at most 2"):
        leases.hold_devices(3, cards)
    assert leases.hold_devices(1, []) == []


@pytest.mark.parametrize(
    ("asked", "found"),
    [("0", ["GPU-a"]), ("1,0", ["MIG-b", "MIG-c", "GPU-a"]), ("MIG-c", ["MIG-c"]), ("", []), ("0,-1,1", ["GPU-a"])],
)
def test_devices_are_those_that_cuda_would_see(asked: str, found: list[str]) -> None:
    assert leases.chosen(asked, [["GPU-a"], ["MIG-b", "MIG-c"]]) == found


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(2, 1, 2), (2, 4, 1), (16, 4, 4), (12, 2, 4), (7, 1, 4), (64, 3, 16)]
)
def test_cores_are_divided_and_threads_are_a_power_of_two(
    cores: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv(leases.WORKERS, str(workers))
    assert leases.threads() == threads


def test_workers_of_one_queue_are_known_by_their_command() -> None:
    worker = ["/venv/bin/python", "/venv/bin/dvc", "exp", "queue-worker", "dvc-exp-50b0e4-2@localhost", "--clean"]
    assert leases.queue_of(worker) == "dvc-exp-50b0e4"
    assert leases.queue_of(["/venv/bin/python", "/venv/bin/dvc", "queue", "start", "-j", "3"]) is None
    assert leases.queue_of([]) is None


def test_outside_of_a_queue_one_experiment_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(leases.WORKERS, raising=False)
    monkeypatch.setenv("DVC_EXP_NAME", "by-hand")
    assert leases.at_once() == 1


@pytest.mark.parametrize(
    ("cores", "processes", "each"), [(2, 1, 2), (2, 2, 1), (1, 2, 1), (16, 3, 4), (3, 1, 2), (64, 8, 8)]
)
def test_processes_of_a_training_share_its_cores_as_powers_of_two(cores: int, processes: int, each: int) -> None:
    assert leases.even(cores, processes) == each
