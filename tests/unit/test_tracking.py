"""Tracking: files first, one run for one experiment, true statuses, MLflow away or started by many at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lib import tracking

PIPELINE = "stages:\n  one: {cmd: x}\n  two: {cmd: x}\n"
STAGE = """
import sys
from dataclasses import dataclass
from stages.lib import errors, stage, tracking

@dataclass
class Params:
    seed: int

def main(p: Params) -> None:
    {body}

stage.run("{name}", main, Params)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: making its tables takes seconds, copying them does not."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path: Path, store: Path) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text(
        "seed: 3\nruntime: {threads: null, log_level: info, tracking_uri: null}\nsweep: {id: null}\n"
    )
    return tmp_path


def start(folder: Path, name: str, body: str, **environment: str) -> subprocess.Popen[str]:
    source = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(source), "DVC_ROOT": str(folder)} | environment
    code = STAGE.format(body=body, name=name)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=pipe, stderr=pipe, text=True, env=variables
    )


def runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    return client.search_runs([found.experiment_id])


def test_four_stages_started_at_once_on_a_missing_store_share_one_run(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    bodies = [f'tracking.report("s{i}", {{"rows/train": {i}}})' for i in range(4)]
    started = [start(folder, f"s{i}", body, DVC_EXP_NAME="puny-otter") for i, body in enumerate(bodies)]
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    (run,) = runs(folder)
    assert run.data.tags["dvc.exp_name"] == "puny-otter"
    assert run.data.params["seed"] == "3"
    assert run.info.status == "FINISHED"


def test_a_failing_stage_leaves_its_reason_and_one_line(folder: Path) -> None:
    process = start(folder, "one", 'raise errors.DataError("data.path: nothing there")')
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "one: data.path: nothing there" in shown
    assert "Traceback" not in shown
    (run,) = runs(folder)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "DataError: data.path: nothing there")


def test_a_stage_ended_by_sigterm_is_killed_in_mlflow_too(folder: Path) -> None:
    process = start(folder, "one", 'print("ready", flush=True); import time; time.sleep(60)')
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert runs(folder)[0].info.status == "KILLED"


def test_mlflow_out_of_reach_loses_no_number(folder: Path) -> None:
    body = 'tracking.report("one", {"val/loss": 0.5}, measured={"speed": 3})'
    process = start(folder, "one", body, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "make sync" in shown
    assert json.loads((folder / "metrics/one.json").read_text()) == {"val/loss": 0.5}
    (measured,) = (folder / "runs").glob("repro-*/one.json")
    assert json.loads(measured.read_text())["speed"] == 3


def test_only_metrics_of_stages_before_this_one_are_filled_in(folder: Path) -> None:
    (folder / "metrics").mkdir()
    (folder / "metrics/one.json").write_text('{"rows/train": 5}')
    (folder / "metrics/two.json").write_text('{"val/loss": 9.0}')
    assert start(folder, "two", "pass").wait(60) == 0
    assert {"rows/train": 5.0}.items() <= runs(folder)[0].data.metrics.items()
    assert "val/loss" not in runs(folder)[0].data.metrics


def test_the_runs_table_holds_at_most_thirty_metrics() -> None:
    many = {f"test/task{i}/field_f1/{arm}": 0.5 for i in range(20) for arm in ("base", "tuned", "delta")}
    chosen = tracking.compared(many | {"val/loss": 1.0, "made/up": 2.0})
    assert len(chosen) == tracking.MAX_COMPARED
    assert next(iter(chosen)) == "val/loss"
    assert "made/up" not in chosen
