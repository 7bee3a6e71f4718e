"""A sweep on a Ray cluster of two nodes that share git and DVC remotes and an MLflow server, and nothing else."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.lib import tracking
from stages.lib.experiments import cluster, kept
from tests.conftest import git, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GRID = "defaults: [none]\nid: spread\nfixed:\n  numerics.device: cpu\ngrid:\n  lora.r: [2, 8]\n"


@pytest.fixture(scope="module")
def pushed(project: Path) -> Path:
    """The finished repository after `git push` and `dvc push`; its remotes lie beside it."""
    git(project.parent, "init", "-q", "--bare", "-b", "main", "remote.git")
    (project / "conf/sweep/spread.yaml").write_text(GRID)
    git(project, "remote", "add", "origin", str(project.parent / "remote.git"))
    assert run(project, "dvc", "remote", "add", "-d", "storage", str(project.parent / "storage")).returncode == 0
    git(project, "add", "-A")
    git(project, "commit", "-qm", "remotes and a sweep")
    git(project, "push", "-q", "origin", "main")
    done = run(project, "dvc", "push")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two nodes with one core each."""
    from stages.lib import engine_ray  # first: it switches the usage statistics off

    del engine_ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cluster.CLONES, str(tmp_path_factory.mktemp("clones")))
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise, and the stages with it
        found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        found.add_node(**node)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    folder = tmp_path_factory.mktemp("server")
    command = [Path(sys.executable).parent / "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/m.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", address[0], "--port", str(address[1])]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, cwd=folder)
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                break
        time.sleep(0.5)
    yield f"http://{address[0]}:{address[1]}"
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def swept(pushed: Path, nodes: Any, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, without data, after the sweep; one node was lost while it trained."""
    driver = tmp_path_factory.mktemp("driver") / "clone"
    git(driver.parent, "clone", "-q", str(pushed.parent / "remote.git"), str(driver))
    raylet = psutil.Process(next(iter(nodes.worker_nodes)).all_processes["raylet"][0].process.pid)
    command = (sys.executable, "-m", "commands.sweep", "spread", "--ray", nodes.address)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, driver, *command, timeout=900, MLFLOW_TRACKING_URI=mlflow_server)
        lost: list[psutil.Process] = []
        while not any("stages.qlora_train" in words(process) for process in lost):
            assert not ended.done(), ended.result().stdout + ended.result().stderr
            time.sleep(0.2)
            lost = raylet.children(recursive=True)
        for process in (raylet, *lost):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        done = ended.result()
    assert done.returncode == 0, done.stdout + done.stderr
    return driver


def words(process: psutil.Process) -> list[str]:
    """Of its command; none when it has ended meanwhile."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_both_points_end_though_a_node_is_lost_while_it_trains(
    swept: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(swept)
    found = kept.every()
    assert sorted(point.params["lora"]["r"] for point in found) == [2, 8]
    for point in found:
        assert len(kept.files(point, "reports/evaluation")) > 1
    client = MlflowClient(tracking_uri=mlflow_server)
    rows = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    assert {(row.info.run_name, row.info.status) for row in rows} == {(point.name, "FINISHED") for point in found}
    assert {row.data.tags["sweep_id"] for row in rows} == {"spread"}


def test_a_point_made_from_what_was_pushed_equals_the_one_made_where_everything_is(
    swept: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["-S", "numerics.device=cpu", "-S", "lora.r=2", "-S", "sweep.id=spread"]
    done = run(pushed, "dvc", "exp", "run", "--temp", "--name", "here", *settings, "evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(pushed)
    here = kept.find("here")
    monkeypatch.chdir(swept)
    (there,) = [point for point in kept.every() if point.params["lora"]["r"] == 2]
    assert here.outs == there.outs
    assert here.metrics == there.metrics
    assert "evaluate" in there.stages


def test_what_another_machine_has_pushed_is_fetched_and_not_run_again(swept: Path, pushed: Path) -> None:
    other = swept.parent / "other"
    git(swept.parent, "clone", "-q", str(pushed.parent / "remote.git"), str(other))
    done = run(other, sys.executable, "-m", "commands.sweep", "spread", "--ray", "127.0.0.1:1")  # no cluster is there
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(git(other, "for-each-ref", "--format=%(objectname)", "refs/exps").split()) >= set(
        git(swept, "for-each-ref", "--format=%(objectname)", "refs/exps").split()
    )


def test_an_experiment_that_was_pushed_halfway_does_not_count_as_there(
    swept: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(swept)
    md5 = kept.every()[0].outs["models/adapter"]
    (pushed.parent / "storage/files/md5" / md5[:2] / md5[2:]).unlink()
    third = swept.parent / "third"
    git(swept.parent, "clone", "-q", str(pushed.parent / "remote.git"), str(third))
    name = kept.every()[0].name
    monkeypatch.chdir(third)
    assert not cluster.fetch(name)
    assert name not in kept.references()
