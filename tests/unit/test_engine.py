"""Work spread over processes: the same results in the same order, faults as themselves, nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pyarrow
import pytest

from stages.lib import engine
from stages.lib.errors import DataError, ExternalError
from stages.lib.schema.runtime import Engine, Runtime

unpickled = 0


class Heavy:
    """Something a partial holds; counts in a worker how often it has arrived there."""

    def __init__(self) -> None:
        self.weight = 1

    def __setstate__(self, state: object) -> None:
        global unpickled
        unpickled += 1


def squared_slowly(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))  # the first is not the first to be ready
    return number**2


def process_and_threads(_: int) -> tuple[int, tuple[str, int, str]]:
    return os.getpid(), (os.environ["RAYON_NUM_THREADS"], pyarrow.cpu_count(), str(Path.cwd()))


def arrivals(heavy: Heavy, _: int) -> int:
    return unpickled


def refused(number: int) -> int:
    if number == 3:
        raise DataError("row 3 is no row")
    return number


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(autouse=True)
def little_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else workers import what all other tests have, torch among it."""
    monkeypatch.setattr(engine, "_imported", lambda: ["stages.lib.engine"])


def use(monkeypatch: pytest.MonkeyPatch, *, workers: int | None, threads: int | None = None) -> None:
    runtime = Runtime(
        threads, workers, Engine.local, ray_address=None, log_level="info", tracking_uri=None, checkpoint_minutes=2
    )
    monkeypatch.setattr(engine, "_runtime", runtime)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items_whatever_the_number_of_workers(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, workers=workers)
    assert list(engine.ordered_map(squared_slowly, range(20))) == [number**2 for number in range(20)]


def test_workers_are_other_processes_of_one_thread_each_in_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, in_tmp: Path
) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    use(monkeypatch, workers=2)
    found = dict(engine.ordered_map(process_and_threads, range(20)))
    assert os.getpid() not in found
    assert len(found) <= 2
    assert set(found.values()) == {("1", 1, str(in_tmp))}
    assert "RAYON_NUM_THREADS" not in os.environ


def test_a_single_item_is_worked_on_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, workers=2)
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    ((process, _),) = engine.ordered_map(process_and_threads, [0])
    assert process == os.getpid()
    assert list(engine.ordered_map(process_and_threads, [])) == []


def test_what_a_function_holds_is_sent_to_each_worker_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, workers=2)
    assert set(engine.ordered_map(partial(arrivals, Heavy()), range(10))) == {1}


def test_items_are_made_a_few_ahead_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, workers=2)
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    results = engine.ordered_map(squared_slowly, items(), ahead=2)
    assert next(results) == 0
    assert len(made) <= 4
    results.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_function_comes_out_as_itself_after_the_results_before_it(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, workers=workers)
    results = engine.ordered_map(refused, range(20))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^row 3 is no row$"):
        next(results)
    assert multiprocessing.active_children() == []


def test_a_worker_killed_by_the_system_ends_with_a_message_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, workers=2)
    with pytest.raises(ExternalError, match=r"ended by signal SIGKILL.*memory.*runtime\.workers lower \(now 2\)"):
        list(engine.ordered_map(killed, range(20)))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_however_the_stage_is_ended_no_worker_outlives_it(sent: signal.Signals) -> None:
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored where tests run behind &
    script = f"{heed}; import time; from stages.lib import engine; list(engine.ordered_map(time.sleep, [60] * 4))"
    stage = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        processes: list[psutil.Process] = []
        deadline = time.monotonic() + 20
        while len(processes) < 4:  # two of multiprocessing's own, and at least two workers
            assert time.monotonic() < deadline
            time.sleep(0.05)
            processes = psutil.Process(stage.pid).children(recursive=True)
        if sent is signal.SIGINT:
            os.killpg(stage.pid, sent)  # as a terminal does it
        else:
            stage.send_signal(sent)
        stage.wait(5)
        assert psutil.wait_procs(processes, timeout=5)[1] == []
    finally:
        stage.kill()


def test_there_are_as_many_workers_as_asked_for_else_as_threads_else_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for workers, threads in ((3, 5), (None, 5), (None, None)):
        use(monkeypatch, workers=workers, threads=threads)
        counts.append(engine.workers())
    assert counts == [3, 5, len(os.sched_getaffinity(0))]
