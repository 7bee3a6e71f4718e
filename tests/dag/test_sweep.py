"""Points run by DVC: beside each other, killed, interrupted, and gone on with."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.lib import tracking
from stages.lib.errors import DataError
from stages.lib.experiments import kept, running
from stages.lib.experiments.points import Point
from stages.lib.schema.sweep import Sweep
from tests.conftest import git, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PIPELINE = """
stages:
  shared:
    cmd: echo shared >> "$PIPELINE_ROOT/runs/ran" && sleep 1 && echo done > shared.txt
    params: [data]
    outs: [shared.txt]
  work:
    cmd: echo work >> "$PIPELINE_ROOT/runs/ran" && cat notes.md params.yaml > out.txt && sleep ${sleep}
    deps: [shared.txt, notes.md]
    params: [r]
    outs: [out.txt]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a pipeline of two stages that take a second each, and an edit that is not committed."""
    folder = tmp_path / "small"
    (folder / "conf").mkdir(parents=True)
    (folder / "runs").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "test")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "test@example.invalid")
    git(folder, "init", "-q", "-b", "main")
    for command in (["init", "-q"], ["config", "hydra.enabled", "true"], ["config", "core.analytics", "false"]):
        assert run(folder, "dvc", *command).returncode == 0
    settings = "r: 1\ndata: 1\nsleep: 1\nsweep:\n  id: null\n"
    for path in ("conf/config.yaml", "params.yaml"):
        (folder / path).write_text(settings)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "notes.md").write_text("committed\n")
    (folder / ".gitignore").write_text("/out.txt\n/shared.txt\n/runs\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "small")
    (folder / "notes.md").write_text("edited\n")
    return folder


def point(r: int, **values: Any) -> Point:
    return Point(f"s-{r}", {"r": r, **values})


def ran(folder: Path) -> list[str]:
    return (folder / "runs/ran").read_text().split()


def driver(folder: Path, points: str) -> "subprocess.Popen[bytes]":
    """A process that runs points, two at a time."""
    code = f"""
from stages.lib.experiments import running
from stages.lib.experiments.points import Point
from stages.lib.schema.sweep import Sweep
running.end_on_signals()
p = Sweep("s", "work", {{}}, {{}}, [], None)
for done in running.run_all([{points}], p, workers=2):
    print(done.point.name, done.status)
"""
    variables = {**os.environ, "PYTHONPATH": str(Path(running.__file__).parents[3])}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=variables, start_new_session=True)


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def assert_untouched(folder: Path) -> None:
    assert git(folder, "branch", "--show-current").strip() == "main"
    assert git(folder, "status", "--short").split() == ["M", "notes.md"]
    assert (folder / "notes.md").read_text() == "edited\n"
    assert git(folder, "stash", "list") == ""


def test_four_points_at_once_share_their_first_stage_and_leave_the_working_tree_alone(small: Path) -> None:
    p = Sweep("s", "work", {}, {}, [], None)
    done = list(running.run_all([point(r) for r in range(4)], p, workers=4))
    assert {one.status for one in done} == {"done"}, [one.reason for one in done]
    assert sorted(ran(small)) == ["shared"] + 4 * ["work"]
    found = {one.name: one.params for one in kept.every()}
    assert {name: (params["r"], params["sweep"]["id"]) for name, params in found.items()} == {
        f"s-{r}": (r, "s") for r in range(4)
    }
    assert kept.find("s-3").read("notes.md") == "edited\n"
    assert_untouched(small)


def test_points_that_share_no_stage_do_not_wait_for_each_other(small: Path) -> None:
    p = Sweep("s", "shared", {}, {}, [], None)
    done = list(running.run_all([point(1, data=1), point(2, data=2)], p, workers=2))
    assert {one.status for one in done} == {"done"}
    assert ran(small) == ["shared", "shared"]


def test_dvc_killed_while_it_starts_an_experiment_breaks_nothing(small: Path) -> None:
    clone = running.start_folder("s")
    process = subprocess.Popen(running.command(point(1), "s", "work"), cwd=clone, stdout=subprocess.DEVNULL)
    wait_for(lambda: (clone / ".git/refs/stash").exists())  # the tree is reset in this moment
    process.kill()
    process.wait()
    assert_untouched(small)
    assert running.run(point(2), "s", "work").status == "done"
    assert kept.find("s-2").read("notes.md") == "edited\n"
    assert_untouched(small)


def test_what_a_killed_driver_left_running_is_taken_over_and_not_run_again(small: Path) -> None:
    first = driver(small, 'Point("s-1", {"r": 1, "sleep": 4})')
    wait_for(lambda: (small / "runs/ran").exists() and "work" in ran(small))
    first.kill()
    first.wait()
    assert running.run(point(1, sleep=4), "s", "work").status == "done"
    assert ran(small) == ["shared", "work"]


def test_an_interrupted_driver_ends_its_points_and_nothing_of_them_is_left(small: Path) -> None:
    code = '*[Point(f"s-{r}", {"r": r, "sleep": 60}) for r in range(3)]'
    process = driver(small, code)
    wait_for(lambda: (small / "runs/ran").exists() and ran(small).count("work") == 2)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.wait(180)  # DVC has a minute to clean up
    assert not [left for left in below if left.is_running() and left.status() != psutil.STATUS_ZOMBIE]
    assert kept.references() == {}
    assert list((small / "runs/sweeps/s").glob("at-*/.dvc/tmp/exps/standalone/tmp*")) == []
    assert_untouched(small)


def test_data_that_changed_since_it_was_added_is_refused(small: Path) -> None:
    (small / "data.txt").write_text("one\n")
    assert run(small, "dvc", "add", "-q", "data.txt").returncode == 0
    git(small, "add", "data.txt.dvc", ".gitignore")
    running.start_folder("s")
    (small / "data.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"data\.txt: changed since it was added.*`dvc add data\.txt`"):
        running.start_folder("s")


GRID = """
defaults: [none]
id: grid
fixed: {split.seed: 7}
grid:
  seed: [1, 2]
  lora.r: [2, 4, 8]
  train.learning_rate: [0.01, 0.02]
"""


def sweep(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "commands.sweep", "grid", "--workers", "4", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    identity = {f"GIT_{who}_{what}": "t@e.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    variables = {**os.environ, **identity, "PATH": path}
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_twelve_points_on_four_workers_with_three_kills_are_twelve_experiments_and_twelve_rows(
    project: Path,
) -> None:
    from mlflow import MlflowClient

    (project / "conf/sweep/grid.yaml").write_text(GRID)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "a sweep")
    draw = random.Random(time.time_ns())
    first = sweep(project)
    for kind in ("stage", "dvc", "driver"):
        time.sleep(draw.uniform(0, 10))
        kill_one(first.pid, kind, draw)
    said = [first.communicate()[0]]
    last = sweep(project)
    said.append(last.communicate()[0])
    assert last.returncode == 0, said
    assert not [text for text in said if "lock" in text], said

    names = [name for name in kept_names(project) if name.startswith("grid-")]
    assert len(names) == 12
    client = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    rows = client.search_runs([found.experiment_id], "tags.sweep_id = 'grid'")
    assert sorted(row.data.tags["dvc.exp_name"] for row in rows) == sorted(names)
    assert {row.info.status for row in rows} == {"FINISHED"}
    listed = run(project, sys.executable, "-m", "commands.sweep", "grid", "--list")
    assert listed.stdout.count(" there") == 13  # and the line that counts
    shutil.rmtree(project / "runs/sweeps/grid")


def kill_one(driver: int, kind: str, draw: random.Random) -> None:
    """SIGKILL one process of a sweep that is of this kind, as soon as there is one."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for pid in draw.sample(found := parts(driver)[kind], min(1, len(found))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.02)
    raise AssertionError(f"no process of kind {kind} in ten minutes")


def parts(driver: int) -> dict[str, list[int]]:
    """Processes of a sweep that runs, by what they are."""
    below = psutil.Process(driver).children(recursive=True) if psutil.pid_exists(driver) else []
    words = {one.pid: command_of(one) for one in below}
    return {
        "driver": [driver] if below else [],
        "dvc": [pid for pid, command in words.items() if "exp" in command],
        "stage": [pid for pid, command in words.items() if any(word.startswith("stages.") for word in command)],
    }


def command_of(process: psutil.Process) -> list[str]:
    """What a process was started with; nothing when it has ended meanwhile."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def kept_names(folder: Path) -> list[str]:
    return git(folder, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").split()
