"""Tracking: files first, one run for one experiment, true statuses, MLflow away or started by many at once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from commands import sync
from stages.lib import config, errors, tracking
from stages.lib.schema.export import Format
from tests.conftest import ROOT

PIPELINE = """
stages:
  one: {cmd: x, outs: [data], metrics: [metrics/one.json: {cache: false}]}
  side: {cmd: x, deps: [data], metrics: [metrics/side.json: {cache: false}]}
  two: {cmd: x, deps: [data], outs: [model]}
  three: {cmd: x, deps: [model, metrics/one.json]}
"""
PARAMS = """
seed: 3
data: {path: rows.jsonl}
dedup: {contamination: {benchmarks: benchmarks}}
prompt: {template: chat.jinja}
runtime: {threads: null, workers: null, engine: local, ray_address: null, log_level: info, tracking_uri: null,
  checkpoint_minutes: 2}
sweep: {id: null}
"""
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


@pytest.fixture
def folder(tmp_path: Path, store: Path) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for stages that run in this process: importing MLflow takes seconds in every other."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")  # MLflow sets it: undone at the end
    monkeypatch.setattr(tracking, "measured", {})
    monkeypatch.setattr(tracking, "_lost", [])
    return folder


def work(stage: str, metrics: dict[str, float] | None = None, fault: Exception | None = None) -> None:
    """A stage's time in MLflow, in this process: it reports, or it fails."""
    with suppress(errors.DataError), tracking.run(stage, config.values()):
        tracking.report(stage, metrics or {})
        if fault:
            raise fault


def start(folder: Path, name: str, body: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    source = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(source), "DVC_ROOT": str(folder)} | environment
    code = STAGE.format(body=body, name=name)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *overrides], cwd=folder, stdout=pipe, stderr=pipe, text=True, env=variables
    )


def runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    return client.search_runs([found.experiment_id])


@pytest.mark.slow
def test_four_stages_started_at_once_on_a_missing_store_share_one_run(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    bodies = [f'tracking.report("s{i}", {{"rows/train": {i}}})' for i in range(4)]
    started = [start(folder, f"s{i}", body, DVC_EXP_NAME="puny-otter") for i, body in enumerate(bodies)]
    assert [process.wait(240) for process in started] == [0, 0, 0, 0]
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


def test_only_metrics_of_stages_this_one_depends_on_are_filled_in(here: Path) -> None:
    (here / "metrics").mkdir()
    (here / "metrics/one.json").write_text('{"merge/kl/mean": 5}')
    (here / "metrics/side.json").write_text('{"val/loss": 9.0}')
    work("two")
    assert runs(here)[0].data.metrics["merge/kl/mean"] == 5
    assert "val/loss" not in runs(here)[0].data.metrics


def test_upstream_follows_outputs_and_metrics_not_the_order_in_dvc_yaml(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.upstream("three") == ["one", "two"]
    assert tracking.upstream("side") == ["one"]
    monkeypatch.chdir(ROOT)
    assert "merge" not in tracking.upstream("evaluate")
    assert "evaluate" in tracking.upstream("quantize_export")


LIVE = (
    *("val/loss", "train/loss", "train/learning_rate"),
    *("train/grad_norm", "train/tokens_seen", "train/tokens_per_second"),
)


def test_the_runs_table_holds_at_most_thirty_metrics() -> None:
    shown = [tracking.compared(json.loads(path.read_text())) for path in sorted((ROOT / "metrics").glob("*.json"))]
    assert len(shown) == 8
    assert len({*LIVE, *(name for metrics in shown for name in metrics)}) <= 30


def test_neither_many_tasks_nor_all_formats_exceed_thirty_metrics() -> None:
    arms = ("base", "tuned", "delta")
    tasks = {f"test/task{i}/field_f1/{arm}": 0.5 for i in range(20) for arm in arms}
    formats = {f"export/{name}/kl/mean": 0.1 for name in (*Format, "one", "more", "still")}
    general = {"general/perplexity/base": 1.0, "general/perplexity/tuned": 1.0}
    plain = dict.fromkeys((name for name in tracking.COMPARED if "*" not in name and name not in general), 1.0)
    chosen = [tracking.compared(metrics) for metrics in (plain, tasks | general | {"made/up": 2.0}, formats)]
    assert sum(len(metrics) for metrics in chosen) <= 30
    assert "made/up" not in chosen[1]
    assert len(chosen[2]) == 7


def test_no_stage_before_training_logs_a_metric_so_that_charts_open_on_the_validation_loss() -> None:
    for stage in tracking.upstream("qlora_train"):
        assert tracking.compared(json.loads((ROOT / f"metrics/{stage}.json").read_text())) == {}


def test_overrides_on_the_command_line_make_a_row_of_their_own_with_their_values(here: Path) -> None:
    work("one")
    assert start(here, "one", "pass", "seed=8").wait(60) == 0
    assert sorted(run.data.params["seed"] for run in runs(here)) == ["3", "8"]


def test_the_key_of_a_plain_repro_changes_with_all_that_determines_the_result(here: Path) -> None:
    keys = [tracking.key(config.values())]
    for folder in ("stages", "benchmarks", "conf/prompt"):
        (here / folder).mkdir(parents=True)
    code = ("stages/one.py", "stages/page.html.jinja", "conf/prompt/own.jinja", "requirements.lock")
    for name in ("rows.jsonl", "chat.jinja", "benchmarks/held_out.jsonl", *code):
        (here / name).write_text("changed")
        keys.append(tracking.key(config.values()))
    (here / "rows.jsonl.dvc").write_text("outs: [{md5: a1}]")
    keys += [tracking.key(config.values()), tracking.key(config.values(["seed=8"]))]
    assert len(set(keys)) == len(keys)
    same = ["runtime.threads=1", "sweep.id=grid", "seed=3"]
    assert tracking.key(config.values(same)) == tracking.key(config.values())


def test_data_that_changed_under_the_same_name_is_named_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "puny-otter")
    (here / "data/splits").mkdir(parents=True)
    for text in ("a", "a", "b"):
        (here / "data/splits/train.parquet").write_text(text)
        work("dedup_split")
    (run,) = runs(here)
    assert len(run.inputs.dataset_inputs) == 2


def test_a_failure_is_taken_back_when_its_stage_or_a_later_one_runs(here: Path) -> None:
    fault = errors.DataError("nothing there")
    work("one", fault=fault)
    assert runs(here)[0].data.tags["failed_stage"] == "one"
    work("two")
    assert not {"failed_stage", "failure"} & runs(here)[0].data.tags.keys()
    work("two", fault=fault)
    work("side")
    assert runs(here)[0].data.tags["failed_stage"] == "two"


def test_a_hiccup_of_mlflow_does_not_hide_how_the_stage_ended(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.log_metrics", None)
    (here / "metrics").mkdir()
    (here / "metrics/one.json").write_text("{}")
    work("two", fault=errors.DataError("nothing there"))
    (run,) = runs(here)
    assert (run.info.status, run.data.tags["failed_stage"]) == ("FAILED", "two")


def test_a_folder_has_the_hash_that_dvc_gives_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b/c.txt").write_text("two")
    # `dvc add` of this folder, DVC 3.67.1
    assert tracking.dvc_md5(tmp_path) == "9ac7ba4a4409640ebaa596b7fe84d343.dir"


def test_a_stage_leaves_how_it_ended_and_what_the_earlier_ones_made(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "puny-otter")
    work("one")
    work("two", fault=errors.DataError("nothing there"))
    left = tracking.ended("puny-otter")
    assert (left["status"], left["tags"]["failure"]) == ("FAILED", "DataError: nothing there")
    assert "ran.one" in left["tags"]


def test_a_process_that_ended_is_not_taken_for_a_later_one_of_its_number() -> None:
    assert sync.is_alive(tracking.process().partition(":")[2])
    assert not sync.is_alive(f"{os.getpid()}:1")


def test_a_run_whose_end_mlflow_did_not_hear_gets_the_status_the_stage_left(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "puny-otter")
    monkeypatch.setattr(tracking, "process", lambda: f"{socket.gethostname()}:1:0")
    work("one")
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = runs(here)
    client.update_run(run.info.run_id, status="RUNNING")
    assert sync.reconcile(run.info.experiment_id) == 1
    assert runs(here)[0].info.status == "FINISHED"


def test_a_run_that_did_not_train_names_the_first_that_trained_its_adapter(here: Path) -> None:
    from mlflow import MlflowClient

    store = tracking.connect(f"sqlite:///{here}/mlflow.db")
    client = MlflowClient()
    for name, day in (("second", "2"), ("first", "1"), ("cached", None)):
        run_id = tracking.run_of(name, store, {})
        client.set_tag(run_id, "md5.models/adapter", "aa.dir")
        if day:
            client.set_tag(run_id, "ran.qlora_train", day)
    assert [sync.name_trainings(sync.rows(store)) for _ in range(2)] == [1, 0]
    found = sync.rows(store)
    assert found["cached"].data.tags["trained_by"] == "first"
    assert "trained_by" not in found["second"].data.tags


def test_a_name_used_again_for_other_parameters_gets_a_row_of_its_own(here: Path, monkeypatch: Any) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("DVC_EXP_NAME", "it's-mine")  # git allows the quote
    work("one", fault=errors.DataError("seed: found 3"))
    work("one", {"val/loss": 1.0})  # the same again
    (only,) = runs(here)
    MlflowClient().set_tag(only.info.run_id, "sweep_id", "s")
    other = tracking.run_of("it's-mine", only.info.experiment_id, {"seed": 4, "runtime": {"threads": 1}})
    found = {run.info.run_id: run for run in runs(here)}
    assert set(found) == {only.info.run_id, other}
    retired = f"it's-mine@{only.info.run_id[:8]}"
    assert found[only.info.run_id].data.tags["dvc.exp_name"] == found[only.info.run_id].info.run_name == retired
    assert "sweep_id" not in found[only.info.run_id].data.tags
    assert found[only.info.run_id].data.metrics == {"val/loss": 1.0}
    assert found[other].data.metrics == {}


def test_what_is_made_of_a_model_and_how_it_ran_makes_no_other_experiment() -> None:
    logged = {"seed": "3", "merge.rows": "4", "runtime.threads": "2"}
    params = {"seed": 3, "merge": {"rows": 8}, "runtime": {"threads": 1}, "lora": {"new": 1}}
    assert not tracking.contradicts(logged, params)
    assert tracking.contradicts(logged, params | {"seed": 4})
