"""make reproduce, on the tiny pipeline: equal bytes from the remotes alone; each planted difference, with its cause."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stages.lib.experiments import reproduction
from stages.lib.experiments.reproduction import Reproduction
from tests.conftest import git, run
from tests.hub_stub import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MAIN = "def main(p: Params) -> None:"


@pytest.fixture
def planted(project: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository, to commit a change to that no run has seen; taken back afterwards."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(project.parent / "hub-cache"))
    recorded = git(project, "rev-parse", "HEAD").strip()
    yield project
    git(project, "reset", "-q", "--hard", recorded)


def repeat(tmp_path: Path, until: str) -> Reproduction:
    return reproduction.reproduce(reproduction.locate("HEAD"), tmp_path / "again", until=until)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_an_experiment_comes_out_the_same_from_a_clone_elsewhere_with_only_git_and_dvc_remotes(
    finished: Path, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(finished, tmp_path / "repo", symlinks=True))
    hub, store, elsewhere = (tmp_path / name for name in ("hub.git", "store", "some where/clone"))
    git(tmp_path, "init", "-q", "--bare", str(hub))
    git(project, "remote", "add", "shared", str(hub))
    for command in (
        ["add", "data/raw/rows.jsonl"],  # the user's data in DVC, not in git
        ["remote", "add", "-d", "store", str(store)],
    ):
        if command[0] == "add":
            git(project, "rm", "-q", "--cached", "data/raw/rows.jsonl")
        assert run(project, "dvc", *command).returncode == 0
    git(project, "add", "-A")
    git(project, "commit", "-qm", "data in DVC")
    for command in (["run", "--temp", "-n", "ours", "evaluate"], ["push", "shared", "ours"]):
        done = run(project, "dvc", "exp", *command)
        assert done.returncode == 0, done.stderr
    git(project, "push", "-q", "shared", "HEAD:refs/heads/main")
    git(tmp_path, "clone", "-q", "-b", "main", str(hub), str(elsewhere))

    command = [sys.executable, "-m", "commands.reproduce", "ours", "--until", "evaluate"]
    done = run(elsewhere, *command, timeout=900, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base_model: restored, not run" in done.stdout  # no model hub can be reached
    assert (
        "reproduced bit for bit (5 stages: prepare, dedup_split, tokenize_pack, qlora_train, evaluate)" in done.stdout
    )
    assert not (elsewhere / "mlflow.db").exists()


def test_code_that_is_not_what_ran_is_found_where_it_acts(planted: Path, tmp_path: Path) -> None:
    replace(
        planted / "stages/dedup_split.py",
        "def main(p: Params) -> None:",
        "def main(p: Params) -> None:\n    p.split.seed += 1",
    )
    git(planted, "commit", "-qam", "another split")
    found = repeat(tmp_path, "dedup_split")
    assert found.first is not None
    assert found.first.stage == "dedup_split"
    assert found.first.causes == {"code": ["stages/dedup_split.py is another"]}
    assert "train.parquet" in found.first.outs["data/splits"]


def test_code_that_is_not_what_ran_but_does_the_same_is_no_difference(planted: Path, tmp_path: Path) -> None:
    with (planted / "stages/prepare.py").open("a") as file:
        file.write("# the same\n")
    git(planted, "commit", "-qam", "a comment")
    assert repeat(tmp_path, "prepare").verdict() == "reproduced bit for bit"


def test_data_that_are_not_what_was_read_are_found_at_prepare(planted: Path, tmp_path: Path) -> None:
    replace(planted / "data/raw/rows.jsonl", '"content": "', '"content": "once more ')
    git(planted, "commit", "-qam", "other rows")
    found = repeat(tmp_path, "dedup_split")
    assert found.first is not None
    assert (found.first.stage, list(found.first.causes)) == ("prepare", ["data"])
    assert found.stages == ["prepare"]  # what follows would only repeat it


def test_a_base_that_was_fetched_with_other_bytes_is_found_at_base_model(
    planted: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as stub:
        held = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
        held["model.safetensors"] = held["model.safetensors"][:-1] + bytes([held["model.safetensors"][-1] ^ 1])
        stub.files["models/tiny/llama"] = held
        monkeypatch.setenv("HF_ENDPOINT", stub.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
        found = repeat(tmp_path, "base_model")
    assert found.first is not None
    assert (found.first.stage, list(found.first.causes)) == ("base_model", ["base"])
    assert "model.safetensors" in found.first.outs["models/base"]


OTHER_ORJSON = """
import sys
if "stages.prepare" in sys.orig_argv:
    import orjson
    read = orjson.loads
    def loads(text):
        found = read(text)
        for turn in found["messages"]:
            turn["content"] += "!"
        return found
    orjson.loads = loads
"""


def test_a_package_of_another_version_is_found_where_it_acts(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    (packages / "orjson-99.0.dist-info").mkdir(parents=True)
    (packages / "orjson-99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: orjson\nVersion: 99.0\n")
    (packages / "sitecustomize.py").write_text(OTHER_ORJSON)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    found = repeat(tmp_path, "prepare")
    assert found.first is not None
    assert (found.first.stage, list(found.first.causes)) == ("prepare", ["package"])
    assert found.first.causes["package"][0].startswith("orjson: as locked when recorded, 99.0 (locked: ")


def test_a_result_that_hangs_on_the_number_of_threads_is_found_and_comes_with_the_recorded_number(
    planted: Path, tmp_path: Path
) -> None:
    hangs = f'{MAIN}\n    p.seed += int(__import__("os").environ["OMP_NUM_THREADS"])'
    replace(planted / "stages/qlora_train.py", MAIN, hangs)
    params = (planted / "params.yaml").read_text()
    here = len(os.sched_getaffinity(0))
    (planted / "params.yaml").write_text(params.replace("threads: null", f"threads: {here + 1}"))
    done = run(planted, "dvc", "repro", "qlora_train", timeout=900)
    assert done.returncode == 0, done.stderr
    (planted / "params.yaml").write_text(params)  # no stage tracks runtime
    git(planted, "commit", "-qam", "recorded with more threads")
    lock = yaml.safe_load((planted / "dvc.lock").read_text())

    found = repeat(tmp_path, "qlora_train")
    assert found.first is not None
    assert found.first.stage == "qlora_train"
    assert found.first.causes == {"threads": [f"threads: {here + 1} when recorded, {here} here"]}
    assert "adapter_model.safetensors" in found.first.outs["models/adapter"]
    assert found.verdict() == f"reproduced bit for bit with the recorded threads ({here + 1})"
    assert yaml.safe_load((planted / "dvc.lock").read_text()) == lock
