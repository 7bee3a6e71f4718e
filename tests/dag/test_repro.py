"""The pipeline as people run it: `dvc repro` and `dvc exp run`, on a tiny random model and rows made here."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.lib import files, tracking
from tests.conftest import ROOT, git, run

TRAINED = ["qlora_train", "evaluate", "merge", "quantize_export"]
STAGES = ["base_model", "prepare", "dedup_split", "tokenize_pack", *TRAINED]


def executed(shown: str) -> list[str]:
    """The stages DVC ran, from what it printed."""
    return [line.split("'")[1] for line in shown.splitlines() if line.startswith("Running stage '")]


def runs(folder: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    return {run.data.tags["dvc.exp_name"]: run for run in client.search_runs([found.experiment_id])}


def test_one_command_makes_every_output_and_every_row_is_accounted_for(finished: Path) -> None:
    for path in ("models/base", "models/adapter", "models/merged", "models/export", "reports/evaluation/index.html"):
        assert (finished / path).exists(), path
    metrics = {name: files.read_json(finished / f"metrics/{name}.json") for name in STAGES}
    assert metrics["prepare"]["rows/in"] == 91
    assert metrics["prepare"]["rows/out"] == 90
    rejected = (finished / "data/prepared/rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 1
    assert "rows.jsonl:91" in rejected[0]
    (row,) = runs(finished).values()
    assert row.info.status == "FINISHED"
    assert row.data.params["lora.r"] == "4"
    assert "val/loss" in row.data.metrics
    assert len([key for key in row.data.metrics if not key.startswith("system/")]) <= 30


def test_a_second_repro_runs_nothing(finished: Path) -> None:
    again = run(finished, "dvc", "repro")
    assert again.returncode == 0
    assert executed(again.stdout) == []


@pytest.mark.parametrize(
    ("touched", "stages"),
    [
        ("stages/lib/packing.py", ["tokenize_pack"]),
        ("stages/lib/dedup.py", ["dedup_split"]),
        ("requirements.lock", STAGES),
    ],
)
def test_touching_a_helper_makes_exactly_its_importers_run(finished: Path, touched: str, stages: list[str]) -> None:
    before = (finished / touched).read_text()
    try:
        (finished / touched).write_text(before + "\n# touched\n")
        status = json.loads(run(finished, "dvc", "status", "--json").stdout)
    finally:
        (finished / touched).write_text(before)
    changed = {
        name
        for name, entries in status.items()
        for entry in entries
        if isinstance(entry, dict) and touched in entry.get("changed deps", {})
    }
    assert set(stages) <= changed
    assert changed == {name for name in STAGES if touched in _deps(finished, name)}


def _deps(folder: Path, name: str) -> list[str]:
    return list(yaml.safe_load((folder / "dvc.yaml").read_text())["stages"][name]["deps"])


@pytest.mark.slow
def test_an_experiment_runs_the_changed_stage_and_what_follows_and_gets_its_own_row(finished: Path) -> None:
    known = set(runs(finished))
    done = run(finished, "dvc", "exp", "run", "-n", "small-rank", "-S", "lora.r=2", "evaluate")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert executed(done.stdout) == ["qlora_train", "evaluate"]
    found = runs(finished)
    assert set(found) == known | {"small-rank"}
    assert found["small-rank"].data.params["lora.r"] == "2"
    git(finished, "checkout", "-q", ".")
    assert run(finished, "dvc", "checkout").returncode == 0


@pytest.mark.slow
def test_an_experiment_that_ran_nothing_gets_its_row_by_sync(finished: Path) -> None:
    done = run(finished, "dvc", "exp", "run", "-n", "cached", "--temp", "-S", "lora.r=4", "evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    assert executed(done.stdout) == []
    for _ in range(2):
        synced = run(finished, "python", "-m", "commands.sync")
        assert synced.returncode == 0, synced.stderr[-3000:]
    cached = runs(finished)["cached"]
    assert cached.data.params["lora.r"] == "4"
    assert cached.data.tags["md5.models/adapter"].endswith(".dir")
    assert "val/loss" in cached.data.metrics
    trained = next(row for name, row in runs(finished).items() if name.startswith("repro-"))
    assert [found.dataset for found in cached.inputs.dataset_inputs] == [
        found.dataset for found in trained.inputs.dataset_inputs
    ]
    attached = finished / "mlartifacts" / cached.info.run_id / "artifacts"
    assert len(files.read_json(attached / "samples.json")["data"]) > 0
    assert (attached / "metrics/evaluate.json").read_text() == (finished / "metrics/evaluate.json").read_text()


@pytest.mark.slow
def test_a_failing_stage_says_how_to_get_its_outputs_back_and_that_works(finished: Path) -> None:
    before = files.sha256(finished / "models/adapter/adapter_model.safetensors")
    failed = run(finished, "dvc", "exp", "run", "-S", "lora.target_modules=[no_such_layer]", "qlora_train")
    assert failed.returncode != 0
    assert "lora.target_modules" in failed.stderr
    assert "To get them back: dvc checkout qlora_train" in failed.stderr
    assert not (finished / "models/adapter").exists()
    assert run(finished, "dvc", "checkout", "qlora_train").returncode == 0
    assert files.sha256(finished / "models/adapter/adapter_model.safetensors") == before
    git(finished, "checkout", "-q", ".")


def outs(folder: Path) -> dict[str, str]:
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_forced_repeat_on_one_thread_and_a_clone_elsewhere_give_the_same_hashes(
    finished: Path, server: str, tmp_path: Path
) -> None:
    clone = tmp_path / "somewhere else" / "clone"
    git(tmp_path, "clone", "-q", str(finished), str(clone))
    params = yaml.safe_load((clone / "params.yaml").read_text())
    params["runtime"]["threads"] = 1
    (clone / "params.yaml").write_text(yaml.safe_dump(params))
    (clone / "dvc.lock").unlink()
    done = run(clone, "dvc", "repro", "-f", HF_ENDPOINT=server, HF_HUB_OFFLINE="0", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(executed(done.stdout)) == set(STAGES)
    assert outs(clone) == outs(finished)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_queued_sweep_of_four_points_on_two_workers_gives_four_successes_and_four_rows(finished: Path) -> None:
    known = set(runs(finished))
    grid = ["-S", "lora.r=2,8", "-S", "train.learning_rate=0.001,0.02"]
    assert run(finished, "dvc", "exp", "run", "--queue", *grid, "evaluate").returncode == 0
    assert run(finished, "dvc", "queue", "start", "-j", "2").returncode == 0
    status = "Running"
    while "Queued" in status or "Running" in status:  # pytest's timeout ends it otherwise
        time.sleep(5)
        status = run(finished, "dvc", "queue", "status").stdout
    assert status.count("Success") == 4, status
    added = {name: found for name, found in runs(finished).items() if name not in known}
    assert sorted(
        (found.data.params["lora.r"], found.data.params["train.learning_rate"]) for found in added.values()
    ) == [
        ("2", "0.001"),
        ("2", "0.02"),
        ("8", "0.001"),
        ("8", "0.02"),
    ]
    assert {found.info.status for found in added.values()} == {"FINISHED"}


def test_the_readme_says_which_stages_a_change_runs() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    said = {section.strip(" `"): row[2].strip() for row in rows for section in row[1].split(",")}
    sections = {param for stage in pipeline.values() for param in stage["params"]} | {"runtime", "sweep"}
    table = {section: stages for section, stages in said.items() if "/" not in section}
    assert table == {section: ", ".join(follows(pipeline, section)) or "none" for section in sections}


def follows(pipeline: dict[str, Any], section: str) -> list[str]:
    """The stages that read a section, and those that read what these write, in the order of dvc.yaml."""
    chosen: list[str] = []
    written: set[str] = set()
    for name, stage in pipeline.items():
        if section in stage["params"] or written & set(stage["deps"]):
            chosen.append(name)
            made = [*stage["outs"], *stage["metrics"], *stage.get("plots", [])]
            written |= {next(iter(out)) if isinstance(out, dict) else out for out in made}
    return chosen
