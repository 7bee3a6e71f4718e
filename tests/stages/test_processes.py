"""A training in two processes, as its command runs: who starts them, and how often they are killed, changes no byte."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.lib import launching
from stages.lib.schema.runtime import Engine, Launcher, Runtime
from stages.lib.schema.train import Sharding, Train
from tests import sharded_training, tiny_training
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


def test_processes_that_share_the_model_learn_what_those_that_hold_it_do_and_go_on_when_killed(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_thread = Runtime(1, 1, Engine.local, None, "error", None, 0, Launcher.torchrun)
    monkeypatch.setattr(launching, "_runtime", one_thread)
    p = replace(tiny_training.TRAIN, epochs=2.0, gradient_accumulation_steps=2, processes=2)
    fsdp = replace(p, sharding=Sharding.fsdp)

    def fit(how: Train, points: str) -> dict[str, Any]:
        return launching.launch(sharded_training.fit, tiny_model_dir, how, tmp_path / points, processes=2, device="cpu")

    apart, shared = fit(p, "apart"), fit(fsdp, "shared")
    assert set(apart["held"].values()) == {1.0}
    assert shared["held"] == {"base_layer.weight": 0.5, "lora_A.default.weight": 0.5, "lora_B.default.weight": 0.5}
    for name, values in apart["adapter"].items():
        assert shared["adapter"][name] == pytest.approx(values, rel=1e-3, abs=1e-5)
    shutil.rmtree(max((tmp_path / "shared").glob("step-*")))  # as if killed between the last two points
    assert fit(fsdp, "shared") == shared


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
    assert training.wait(timeout=300) == 2
    assert "process 1 of train.processes ended by signal SIGKILL" in (broken / "log.txt").read_text()
    assert [run.info.status for run in runs_of(broken)] == ["FAILED"]

    training = start(broken, "runtime.launcher=torchrun", *TWO)
    left = processes_of(training, broken, 4)
    os.kill(training.pid, signal.SIGKILL)
    assert psutil.wait_procs(left, timeout=60)[1] == []

    training = start(broken, "runtime.launcher=ray", *TWO)
    processes_of(training, broken, 6)[1].send_signal(signal.SIGKILL)
    assert training.wait(timeout=300) == 2
    assert "ended under Ray Train" in (broken / "log.txt").read_text()

    assert trained(broken, "runtime.launcher=ray", *TWO) == expected
    said = (broken / "log.txt").read_text()
    assert said.count("goes on after step-") == 3
    assert said.count("ended: all 10 steps done") == 1  # the first process alone speaks
    (run,) = runs_of(broken)
    assert (run.info.status, run.data.metrics["train/loss"] > 0) == ("FINISHED", True)
