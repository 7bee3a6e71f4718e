"""A training in two processes, as its command runs: who starts them, and how often they are killed, changes no byte."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.stages.test_resume import ready, runs_of, start, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TWO = ("train.processes=2", "train.gradient_accumulation_steps=2")


def processes_of(training: subprocess.Popen[str], repository: Path, step: int) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks, once the point of a step was written."""
    while not any(point.name >= f"step-{step:08d}" for point in repository.glob(".checkpoints/*/*/step-*")):
        assert training.poll() is None, (repository / "log.txt").read_text()
        time.sleep(0.01)
    found = {}
    for process in psutil.Process(training.pid).children(recursive=True):
        told = process.environ()
        if "stages.lib.launching" in process.cmdline():
            found[int(told["RANK"])] = process
        elif "RayTrainWorker" in process.name() or any("RayTrainWorker" in word for word in process.cmdline()):
            found[len(found)] = process
    assert len(found) == 2, found
    return [found[rank] for rank in sorted(found)]


def test_one_process_gives_the_same_bytes_however_it_is_started(tmp_path: Path, tiny_model_dir: Path) -> None:
    repository = ready(tmp_path / "repo", tiny_model_dir)
    assert trained(repository, "runtime.launcher=torchrun") == trained(repository)


def test_torchrun_and_ray_train_give_the_same_bytes_though_processes_are_killed_on_the_way(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    whole, broken = (ready(tmp_path / name, tiny_model_dir) for name in ("whole", "broken"))
    expected = trained(whole, "runtime.launcher=torchrun", *TWO)

    training = start(broken, "runtime.launcher=torchrun", *TWO)
    processes_of(training, broken, 2)[1].send_signal(signal.SIGKILL)
    assert training.wait(timeout=120) == 2
    assert "process 1 of train.processes ended by signal SIGKILL" in (broken / "log.txt").read_text()
    assert [run.info.status for run in runs_of(broken)] == ["FAILED"]

    training = start(broken, "runtime.launcher=torchrun", *TWO)
    left = processes_of(training, broken, 4)
    os.kill(training.pid, signal.SIGKILL)
    assert psutil.wait_procs(left, timeout=10)[1] == []

    training = start(broken, "runtime.launcher=ray", *TWO)
    processes_of(training, broken, 6)[1].send_signal(signal.SIGKILL)
    assert training.wait(timeout=300) == 2
    assert "ended under Ray Train" in (broken / "log.txt").read_text()

    assert trained(broken, "runtime.launcher=ray", *TWO) == expected
    said = (broken / "log.txt").read_text()
    assert said.count("goes on after step-") == 3
    assert said.count("ended: all 11 steps done") == 1  # the first process alone speaks
    (run,) = runs_of(broken)
    assert (run.info.status, run.data.metrics["train/loss"] > 0) == ("FINISHED", True)
