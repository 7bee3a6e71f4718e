"""The commands beside the pipeline: what is out of date, what differs, what a module imports."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import clean, sync, ui
from commands.deps import closure
from commands.differences import differences
from commands.sync import curve
from stages.lib import tracking
from stages.lib.experiments import kept, running
from stages.lib.experiments.kept import up_to_date
from tests.conftest import ROOT

PIPELINE = {"stages": {"split": {}, "train": {}, "merge": {}}}


def lock(r: int, *, packed: str = "a1", adapter: str = "b1") -> dict[str, object]:
    recorded = {"params.yaml": {"lora": {"r": r}}}
    return {
        "stages": {
            "split": {"outs": [{"path": "data/splits", "md5": "a1"}]},
            "train": {
                "params": recorded,
                "deps": [{"path": "data/splits", "md5": packed}],
                "outs": [{"path": "models/adapter", "md5": "b1"}],
            },
            "merge": {"deps": [{"path": "models/adapter", "md5": adapter}], "outs": []},
        }
    }


def test_a_stage_counts_as_current_when_params_and_inputs_are_those_of_the_lock() -> None:
    assert up_to_date(PIPELINE, lock(8), {"lora": {"r": 8}}) == ["split", "train", "merge"]


def test_numbers_of_an_earlier_experiment_are_not_current() -> None:
    assert up_to_date(PIPELINE, lock(8), {"lora": {"r": 16}}) == ["split"]
    assert up_to_date(PIPELINE, lock(8, adapter="old"), {"lora": {"r": 8}}) == ["split", "train"]
    assert up_to_date(PIPELINE, lock(8, packed="old"), {"lora": {"r": 8}}) == ["split"]


def test_numbers_as_dvc_writes_them_into_params_and_into_its_lock_are_the_same() -> None:
    assert kept.parse("rate: 1e-06") == kept.parse("rate: 1.0e-06") == {"rate": 1e-6}
    assert kept.parse("revision: 12e5f") == {"revision": "12e5f"}


def test_differences_name_key_and_both_values() -> None:
    assert differences({"lora": {"r": 4}, "seed": 1}, {"lora": {"r": 16}, "seed": 1}) == [
        "lora.r: 4 in params.yaml, 16 in conf/"
    ]


def test_imports_are_followed_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/lib").mkdir(parents=True)
    for name, text in {
        "stages/__init__.py": "from stages.lib import environment\n",
        "stages/lib/__init__.py": "",
        "stages/lib/environment.py": "",
        "stages/lib/page.py": "import json\n",
        "stages/lib/page.html.jinja": "<html>",
        "stages/lib/other.py": "",
        "stages/train.py": "def main():\n    from stages.lib import page\n",
    }.items():
        (tmp_path / name).write_text(text)
    names = {path.as_posix() for path in closure(Path("stages/train.py"))}
    assert names >= {"stages/lib/page.py", "stages/lib/page.html.jinja", "stages/lib/environment.py", "stages/train.py"}
    assert "stages/lib/other.py" not in names


def test_only_new_validation_losses_are_points_and_they_come_first() -> None:
    table = "step,loss,val_loss\n1,4.0,3.0\n2,2.0,3.0\n3,1.0,1.5\n"
    assert [(point.key, point.step, point.value) for point in curve(table)] == [
        *[("val/loss", 0, 3.0), ("val/loss", 3, 1.5)],
        *[("train/loss", 1, 4.0), ("train/loss", 2, 2.0), ("train/loss", 3, 1.0)],
    ]


PLAN = {
    "dedup_split": {"outs": ["data/splits"]},
    "qlora_train": {"deps": ["data/splits"], "outs": ["models/adapter"]},
}
LOCK = {
    "dedup_split": {"outs": [{"path": "data/splits", "md5": "11aa.dir"}]},
    "qlora_train": {
        "deps": [{"path": "data/splits", "md5": "11aa.dir"}],
        "outs": [{"path": "models/adapter", "md5": "22bb.dir"}],
    },
}
STEPS = 5


@pytest.fixture
def experiment(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of one experiment by path; what lay in its outputs is in the cache under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # MLflow sets it: undone at the end
    shutil.copy(store, tmp_path / "mlflow.db")
    cache = {
        "11/aa.dir": '[{"relpath": "train.parquet", "md5": "33cc"}]',
        "22/bb.dir": '[{"relpath": "samples.jsonl", "md5": "44dd"}]',
        "33/cc": "rows",
        "44/dd": '{"step": 2, "answer": "yes"}\n',
    }
    for name, text in cache.items():
        (tmp_path / ".dvc/cache/files/md5" / name).parent.mkdir(parents=True)
        (tmp_path / ".dvc/cache/files/md5" / name).write_text(text)
    (tmp_path / ".dvc/config").touch()
    (tmp_path / ".git").mkdir()
    rows = "".join(f"{step},{1 / step},2.0\n" for step in range(1, STEPS + 1))
    return {
        "dvc.yaml": yaml.safe_dump({"stages": PLAN}),
        "dvc.lock": yaml.safe_dump({"stages": LOCK}),
        "params.yaml": "lora: {r: 4}\nsweep: {id: null}\n",
        "plots/train.csv": f"step,loss,val_loss\n{rows}",
        "metrics/qlora_train.json": '{"val/loss/tuned": 2.0}',
    }


def test_sync_brings_in_a_cached_experiment_and_what_a_hiccup_left_out(
    experiment: dict[str, str], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    store = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient()
    hurt = tracking.run_of("hurt", store, {})
    for step in (1, 2):
        client.log_metric(hurt, "train/loss", 1 / step, step=step)
    for _ in range(2):
        for name in ("hurt", "cached"):
            sync.bring_in(name, experiment.get, store, {})
    for run_id in (hurt, tracking.run_of("cached", store, {})):
        run: Any = client.get_run(run_id)
        steps = sorted(point.step for point in client.get_metric_history(run_id, "train/loss"))
        assert steps == [*range(1, STEPS + 1)]
        assert len(client.get_metric_history(run_id, "val/loss")) == 1
        assert run.data.metrics["val/loss/tuned"] == 2.0
        (data,) = run.inputs.dataset_inputs
        assert "train.parquet" in data.dataset.source
        attached = tmp_path / "mlartifacts" / run_id / "artifacts"
        assert (attached / "metrics/qlora_train.json").read_text() == experiment["metrics/qlora_train.json"]
        assert json.loads((attached / "samples.json").read_text())["data"] == [[2, "yes"]]


@pytest.mark.parametrize(("stage", "status"), [("qlora_train", "FINISHED"), ("merge", "FAILED")])
def test_a_run_that_failed_before_dvc_had_its_result_from_the_cache_is_finished(
    experiment: dict[str, str], tmp_path: Path, stage: str, status: str
) -> None:
    from mlflow import MlflowClient

    store, client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db"), MlflowClient()
    run_id = tracking.run_of("one", store, {})
    for tag, value in {"process": "elsewhere:1:1", "failed_stage": stage, "failure": "x", "stage": stage}.items():
        client.set_tag(run_id, tag, value)
    client.set_terminated(run_id, "FAILED")
    sync.bring_in("one", experiment.get, store, {"dvc.exp_rev": "c1"})
    run = client.get_run(run_id)
    assert run.info.status == status
    assert ("failure" in run.data.tags) == (status == "FAILED")


def test_sync_goes_on_after_an_experiment_that_does_not_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowException

    seen = []

    def bring_in(name: str, *_: Any) -> None:
        seen.append(name)
        if name == "bad":
            raise MlflowException("the store is locked")

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sync, "bring_in", bring_in)
    monkeypatch.setattr(kept, "references", lambda: {"bad": ("c1", "b"), "good": ("c2", "b")})
    assert sync.main() == 1
    assert seen == ["bad", "good"]
    assert "bad did not come in: the store is locked" in capsys.readouterr().err


def test_sync_says_it_in_one_line_when_the_server_goes_away_midway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowException

    def gone(experiment_id: str) -> int:
        raise MlflowException("connection refused")

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(kept, "references", lambda: {})
    monkeypatch.setattr(sync, "reconcile", gone)
    assert sync.main() == 2
    assert "sync: no MLflow at sqlite:" in capsys.readouterr().err


def test_sync_looks_again_at_an_experiment_only_when_an_output_that_was_missing_is_back(
    experiment: dict[str, str], tmp_path: Path
) -> None:
    store = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    adapter = tmp_path / ".dvc/cache/files/md5/22/bb.dir"
    adapter.rename(tmp_path / "away")
    tracking.run_of("one", store, {})  # as a stage does, before any sync
    assert not sync.is_synced(sync.rows(store)["one"], "c1")
    sync.bring_in("one", experiment.get, store, {"dvc.exp_rev": "c1"})
    run = sync.rows(store)["one"]
    assert sync.is_synced(run, "c1")
    assert not sync.is_synced(run, "c2")
    (tmp_path / "away").rename(adapter)
    assert not sync.is_synced(run, "c1")
    sync.bring_in("one", experiment.get, store, {"dvc.exp_rev": "c1"})
    assert sync.is_synced(sync.rows(store)["one"], "c1")


def test_sync_and_ui_use_the_store_that_the_stages_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("runtime: {tracking_uri: 'http://chosen:1'}\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:1")

    def connect(uri: str) -> str:
        raise ConnectionError(uri)

    monkeypatch.setattr(tracking, "connect", connect)
    for command in (sync, ui):
        with pytest.raises(ConnectionError, match="http://chosen:1"):
            command.main()


def fake_dvc(folder: Path, monkeypatch: pytest.MonkeyPatch, status: str) -> Path:
    """Put a `dvc` first on PATH that shows a queue's status and writes down what it was asked; returns that file."""
    asked = folder / "asked"
    (folder / "dvc").write_text(f"#!/bin/sh\necho $* >> {asked}\necho '{status}'\n")
    (folder / "dvc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(folder)
    (folder / ".dvc/tmp/exps/tmp1").mkdir(parents=True)
    return asked


def test_clean_touches_nothing_while_a_queued_experiment_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake_dvc(tmp_path, monkeypatch, "Task Name Created Status\n1a2b3c4 puny-otter 05:10 AM Running")
    assert clean.main() == 2
    assert "found queued experiments running there (1)" in capsys.readouterr().err
    assert Path(".dvc/tmp/exps/tmp1").exists()
    assert asked.read_text() == "queue status\n"


def test_clean_frees_the_disk_when_the_queue_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_dvc(tmp_path, monkeypatch, "1a2b3c4 puny-otter 05:10 AM Success\n\nWorker status: 0 active, 0 idle")
    copy, collected = Path("runs/sweeps/s/at-1"), list[Path]()
    (copy / ".dvc/tmp").mkdir(parents=True)
    (copy / ".dvc/tmp/start.json").write_text("{}")
    monkeypatch.setattr(running, "collect", lambda folder: collected.append(folder.relative_to(tmp_path)))
    assert clean.main() == 0
    assert collected == [copy]  # what a killed driver left there is not lost
    assert not copy.exists()
    assert not Path(".dvc/tmp/exps/tmp1").exists()
    assert "gc" in asked.read_text()


def make_export(*variables: str) -> subprocess.CompletedProcess[str]:
    """What `make export` would do, without making the environment."""
    made = ["--old-file=env", "--old-file=.venv/installed"]
    command = ["make", "--dry-run", "--no-print-directory", *made, "export", *variables]
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)


def test_an_export_runs_under_the_name_of_its_experiment() -> None:
    assert make_export("EXP=puny-otter").stdout.splitlines()[-2:] == [
        "dvc exp apply puny-otter",
        "DVC_EXP_NAME=puny-otter dvc repro",
    ]


def test_an_export_of_nothing_is_refused_in_one_line() -> None:
    check = make_export().stdout.splitlines()[0]
    done = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "make export EXP=<name>" in line
