"""From an export to the model registry: what is copied, who becomes champion, and what is refused untouched."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import promote
from stages.lib import config, files, registry, tracking
from stages.lib.comparison import PREDICTIONS
from stages.lib.export import manifest
from tests.conftest import ROOT, git
from tests.evaluate_settings import settings
from tests.promoted import edit, make_export, predictions

WEAK, GOOD, BEST = 13, 18, 24  # rows of 24 that a model answers right
NAME = "tuned"  # of the registered model; each test has its own
P = settings()
OUTPUT = promote._output  # before the fixtures below answer for DVC


def of(tuned: int, **changes: Any) -> list[dict[str, Any]]:
    return predictions({"base": 0, "fewshot": 4, "tuned": tuned}, **changes)


def test_a_first_champion_is_better_than_base_and_than_examples() -> None:
    told = registry.judge(of(GOOD), None, "", P)
    assert told.word == "better"
    assert [line.split("of ")[1].split(",")[0] for line in told.lines] == ["base", "fewshot"]


def test_better_than_the_base_alone_makes_no_champion() -> None:
    rows = predictions({"base": 0, "fewshot": GOOD, "tuned": GOOD})
    assert registry.judge(rows, None, "", P).word == "cannot tell"
    assert registry.judge(predictions({"base": 0, "fewshot": BEST, "tuned": WEAK}), None, "", P).word == "worse"


def test_a_challenger_is_judged_by_the_difference_and_its_interval() -> None:
    assert registry.judge(of(BEST), of(WEAK), "version 1", P).word == "better"
    assert registry.judge(of(WEAK), of(BEST), "version 1", P).word == "worse"
    almost = registry.judge(of(GOOD + 1), of(GOOD), "version 1", P)
    assert almost.word == "cannot tell"
    assert almost.lines == [
        "parameters, field_f1: 0.792 against 0.750 of version 1, +0.042 (+0.000 to +0.125, 24 rows): cannot tell"
    ]


def test_worse_on_one_task_outweighs_better_on_another() -> None:
    other = [row | {"task": "summary"} for row in of(WEAK)]
    champions_other = [row | {"task": "summary"} for row in of(BEST)]
    assert registry.judge(of(BEST) + other, of(WEAK) + champions_other, "version 1", P).word == "worse"


def test_models_of_different_test_rows_cannot_be_told_apart() -> None:
    told = registry.judge(of(BEST), of(WEAK, first=1), "version 1", P)
    assert told.word == "cannot tell"
    assert told.lines == ["24 test rows, version 1 has 24, of which 23 are the same: not one test set"]


def test_models_scored_by_different_measures_cannot_be_told_apart() -> None:
    older = [{key: value for key, value in row.items() if key != "bleu"} for row in of(WEAK)]
    assert "other measures" in registry.judge(of(BEST), older, "version 1", P).lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Path]:
    """A committed repository, and its MLflow store with the run of `dvc repro`: opening a store takes long."""
    with pytest.MonkeyPatch.context() as patches:
        folder = tmp_path_factory.mktemp("promote") / "repo"
        make_repository(folder)
        shutil.copy(store, folder / "mlflow.db")
        yield from tracked(folder, f"sqlite:///{folder}/mlflow.db", patches)


def make_repository(folder: Path) -> None:
    params = {
        "evaluate": yaml.safe_load((ROOT / "conf/evaluate/three_arms.yaml").read_text()) | {"bootstrap_samples": 200},
        "prompt": {"template": "chat.jinja"},
        "data": {"path": "rows.jsonl"},
        "dedup": {"contamination": {"benchmarks": "benchmarks"}},
        "runtime": {"tracking_uri": None},
        "sweep": {"id": None},
    }
    (folder / ".dvc").mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / ".gitignore").write_text("/mlflow.db\n/mlartifacts/\n/runs/\n/models/\n/data/\n/reports/\n/promoted/\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "an experiment")


def tracked(folder: Path, uri: str, patches: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a repository, with the MLflow run of its experiment."""
    import mlflow

    patches.chdir(folder)
    for name in ("DVC_ROOT", "DVC_EXP_NAME"):
        patches.delenv(name, raising=False)
    patches.setenv("MLFLOW_TRACKING_URI", uri)
    patches.setattr(promote, "_output", without_dvc(promote._output))
    for name in ("load", "values"):  # params.yaml stays as it is, and composing it takes long
        patches.setattr(config, name, functools.cache(getattr(config, name)))
    before = mlflow.get_tracking_uri()
    tracking.run_of(tracking.key(config.values()), tracking.connect(tracking.address(None)), {})
    yield folder
    mlflow.set_tracking_uri(before)


@pytest.fixture
def repository(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """That repository with an export and its evaluation, and a model of the test's own, without versions."""
    import mlflow

    monkeypatch.chdir(folder)
    monkeypatch.setitem(globals(), "NAME", f"{request.node.name[:60]}-tuned")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    git(folder, "checkout", "-q", "--", ".")
    for made in ("models", "promoted", "reports"):
        shutil.rmtree(folder / made, ignore_errors=True)
    make_export(folder / "models/export")
    evaluated(BEST)
    return folder


def promoted(*arguments: str) -> int:
    return promote.main(["--name", NAME, *arguments])


def without_dvc(real: Callable[..., str], status: str = "{}") -> Callable[..., str]:
    """The commands that promote runs, but for DVC, whose answer is given."""
    return lambda *command: status if "dvc" in command else real(*command)


def evaluated(right: int, **changes: Any) -> None:
    files.write_rows(Path("reports/evaluation/predictions.parquet"), of(right, **changes), PREDICTIONS)


def trained(weights: bytes, right: int, **changes: Any) -> None:
    """Another model in the place of the last."""
    shutil.rmtree("models")
    make_export(Path("models/export"), weights=weights)
    evaluated(right, **changes)


def held() -> tuple[dict[str, str], list[str]]:
    """Aliases of the registered model, and the versions it has."""
    from mlflow import MlflowClient

    found = MlflowClient().search_registered_models(f"name = '{NAME}'")
    versions = MlflowClient().search_model_versions(f"name = '{NAME}'")
    return (dict(found[0].aliases) if found else {}), sorted(version.version for version in versions)


def test_an_export_becomes_champion_traceable_to_commit_and_run(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promoted() == 0
    aliases, versions = held()
    assert (aliases, len(versions)) == ({"champion": versions[0]}, 1)
    copy = repository / "promoted" / NAME / files.sha256(repository / "models/export/manifest.json")[:12]
    assert manifest.faults(copy) == []
    told, version = manifest.read(copy)["promoted"], registry.champion(NAME)
    assert told["commit"] == version.tags["git.commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert told["run_id"] == version.run_id
    assert told["experiment"] == version.tags["dvc.exp_name"] == tracking.key(config.values())
    assert version.source == copy.as_uri()
    assert version.tags["adapter.sha256"] == files.sha256(repository / "models/adapter/adapter_model.safetensors")
    assert not told["is_dirty"]
    assert version.tags["gate"] == "better"
    assert "version 1 is champion" in capsys.readouterr().out
    assert promoted() == 0
    assert held() == (aliases, versions)


def test_a_challenger_that_is_not_better_stays_candidate_and_may_try_again(repository: Path) -> None:
    assert promoted() == 0
    trained(b"GGUF other", GOOD)
    assert promoted() == promoted() == 1
    aliases, versions = held()
    assert aliases == {"champion": versions[0], "candidate": versions[1]}
    assert len(versions) == 2


def test_a_better_challenger_takes_the_place_of_the_champion(repository: Path) -> None:
    evaluated(WEAK)
    assert promoted() == 0
    trained(b"GGUF better", BEST)
    assert promoted() == 0
    aliases, versions = held()
    assert aliases == {"champion": versions[1]}


def test_against_a_champion_of_other_test_rows_a_challenger_stays_candidate(repository: Path) -> None:
    evaluated(WEAK)
    assert promoted() == 0
    trained(b"GGUF better", BEST, first=5)
    assert promoted() == 1
    assert registry.versions(NAME)[manifest.sha256_of(Path("models/export"))].tags["gate"] == "cannot tell"


def test_against_a_champion_without_predictions_nothing_can_be_told(repository: Path) -> None:
    assert promoted() == 0
    run = registry.champion(NAME).run_id
    shutil.rmtree(next((repository / "mlartifacts").glob(f"{run}/artifacts/promoted")))
    trained(b"GGUF better", BEST)
    assert promoted() == 1


def refused(repository: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a refusal, which leaves neither a copy nor a version behind."""
    assert promoted(*arguments) == 2
    assert not (repository / "promoted").exists()
    assert held() == ({}, [])
    return capsys.readouterr().err


def test_an_edited_export_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(repository / "models/export")
    assert "README.md: changed" in refused(repository, capsys)


def test_an_export_of_another_adapter_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "models/adapter/adapter_model.safetensors").write_bytes(b"trained since")
    assert "another adapter" in refused(repository, capsys)


def test_what_no_commit_makes_is_refused_unless_that_is_wanted(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "notes.txt").write_text("changes no result")
    (repository / ".gitignore").open("a").write("# changed\n")
    assert ".gitignore: not committed" in (said := refused(repository, capsys))
    assert "notes.txt" not in said
    assert promoted("--allow-dirty") == 0
    assert registry.champion(NAME).tags["is_dirty"] == "true"


def test_an_export_that_dvc_would_make_again_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {
        "merge": ["changed command"],
        "quantize_export": [
            {"changed deps": {"stages/lib/card.py": "modified", "models/merged": "deleted"}},
            {"changed outs": {"models/export": "not in cache"}},
        ],
    }
    monkeypatch.setattr(promote, "_output", without_dvc(promote._output, json.dumps(status)))
    assert promote.unrecorded() == [
        "merge: changed command",
        "quantize_export: stages/lib/card.py modified",
        "quantize_export: models/export not in cache",
    ]
    refused(repository, capsys)


def test_an_export_without_an_mlflow_run_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found none, expected one" in refused(repository, capsys, "--exp", "never-ran")


def test_the_experiment_that_trained_the_adapter_is_found_by_its_hash(repository: Path) -> None:
    def locked(md5: str) -> str:
        return yaml.safe_dump({"stages": {"qlora_train": {"outs": [{"path": "models/adapter", "md5": md5}]}}})

    experiment = tracking.connect(tracking.address(None))
    for name, md5 in (("rocky-dogs", "a.dir"), ("other-cats", "b.dir")):
        (repository / "dvc.lock").write_text(locked(md5))
        git(repository, "add", "-A")
        git(repository, "commit", "-qm", name)
        git(repository, "update-ref", f"refs/exps/ab/cdef/{name}", "HEAD")
        tracking.run_of(name, experiment, {})
    params = config.values() | {"seed": 7}  # an experiment's params.yaml has no run of its own under `dvc repro`
    assert promote.made_by(None, params, experiment)[0] == "other-cats"
    with pytest.raises(promote.DataError, match="rocky-dogs: trained another adapter"):
        promote.made_by("rocky-dogs", params, experiment)


def test_without_mlflow_nothing_is_half_done(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert promoted() == 2
    assert "MLflow at http://127.0.0.1:1 refused" in capsys.readouterr().err
    assert not (repository / "promoted").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert promoted() == 0


def test_a_registration_that_broke_off_is_carried_on(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient, MlflowException

    def away(*arguments: Any) -> None:
        raise MlflowException("the server is gone")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "set_registered_model_alias", away)
        assert promoted() == 2
    assert promoted() == 0
    aliases, versions = held()
    assert (aliases, len(versions)) == ({"champion": versions[0]}, 1)


def test_a_copy_never_takes_the_place_of_other_files(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    assert promoted("--to", str(tmp_path / "mine")) == 2
    assert (tmp_path / "mine/diary.txt").read_text() == "dear diary"
    assert promoted("--to", str(tmp_path / "new")) == 0
    assert manifest.faults(tmp_path / "new") == []


def test_a_copy_that_was_edited_is_made_again(repository: Path) -> None:
    assert promoted() == 0
    copy = next((repository / "promoted" / NAME).iterdir())
    edit(copy)
    assert promoted() == 0
    assert manifest.faults(copy) == []


@pytest.mark.slow
def test_a_server_takes_versions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server refuses paths of this machine as a source: there the version's source is what the run keeps of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    command = [Path(sys.executable).parent / "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/m.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        make_repository(repository := tmp_path / "repo")
        for _ in tracked(repository, f"http://127.0.0.1:{port}", monkeypatch):
            make_export(repository / "models/export")
            evaluated(BEST)
            assert promoted() == 0
            trained(b"GGUF other", GOOD)
            assert promoted() == 1
            aliases, versions = held()
            assert aliases == {"champion": versions[0], "candidate": versions[1]}
            digest = manifest.sha256_of(Path("models/export"))
            assert registry.versions(NAME)[digest].source.endswith(f"promoted/{digest[:12]}")
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_dvc_says_when_the_export_is_not_what_a_commit_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(promote, "_output", OUTPUT)
    dvc = [sys.executable, "-m", "dvc"]
    make = "mkdir models/export && cp note models/export/note"
    stages = {"quantize_export": {"cmd": make, "deps": ["note"], "outs": ["models/export"]}}
    (tmp_path / "models").mkdir()
    (tmp_path / "note").write_text("one")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    git(tmp_path, "init", "-q")
    subprocess.run([*dvc, "init", "-q"], check=True)
    subprocess.run([*dvc, "repro", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("/models/\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "made")
    assert promote.unrecorded() == []
    (tmp_path / "models/export/note").write_text("edited")
    assert promote.unrecorded() == ["quantize_export: models/export modified"]
    (tmp_path / "note").write_text("two")
    assert promote.unrecorded() == [
        "note: not committed",
        "quantize_export: note modified",
        "quantize_export: models/export modified",
    ]
    shutil.rmtree(tmp_path / ".dvc/cache")  # DVC then does not look at the output itself
    assert promote.unrecorded()[2:] == ["quantize_export: models/export not in cache"]
