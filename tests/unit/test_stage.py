"""The frame of a stage: another python, a full disk, a fault of ours, libraries kept apart."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.lib import environment, stage
from stages.lib.schema.numerics import Device
from stages.lib.schema.runtime import Launcher
from tests.conftest import ROOT, git, run

SCRIPT = """
import errno
from dataclasses import dataclass
from stages.lib import stage

@dataclass
class Params:
    seed: int

def main(p: Params) -> None:
    raise {fault}

stage.run("prepare", main, Params)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {prepare: {cmd: x}}\n")
    (tmp_path / "params.yaml").write_text(
        "seed: 3\ndata: {path: rows.jsonl}\nprompt: {template: chat.jinja}\n"
        "dedup: {contamination: {benchmarks: benchmarks}}\n"
        "runtime: {threads: null, workers: null, engine: local, ray_address: null, log_level: info, "
        "tracking_uri: 'http://127.0.0.1:9', checkpoint_minutes: 2}\nsweep: {id: null}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "fault",
    ['OSError(errno.ENOSPC, "No space left on device", "data/prepared")', 'RuntimeError("No space left on device")'],
)
def test_a_full_disk_is_one_message(folder: Path, fault: str) -> None:
    done = run(folder, sys.executable, "-c", SCRIPT.format(fault=fault), PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_our_own_keeps_its_traceback(folder: Path) -> None:
    done = run(folder, sys.executable, "-c", SCRIPT.format(fault='ValueError("ours")'), PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "Traceback" in done.stderr


LOCK = """schema: '2.0'
stages:
  prepare:
    cmd: x
    outs:
    - {path: data/prepared, md5: 11aa.dir}
    - {path: metrics/prepare.json, md5: 33cc}
"""


@pytest.fixture
def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which DVC started `prepare` again after a run whose lock is committed; its cache is empty."""
    outs = "outs: [data/prepared], metrics: [metrics/prepare.json: {cache: false}]"
    (folder / "dvc.yaml").write_text(f"stages: {{prepare: {{cmd: x, {outs}}}}}\n")
    (folder / "dvc.lock").write_text(LOCK)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").touch()
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "results")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_STAGE", "prepare")
    return folder


def fill_cache(cache: Path) -> None:
    for name, text in {"11/aa.dir": '[{"relpath": "rows.parquet", "md5": "22bb"}]', "22/bb": "rows"}.items():
        (cache / "files/md5" / name).parent.mkdir(parents=True)
        (cache / "files/md5" / name).write_text(text)


def test_a_clone_with_an_empty_cache_is_promised_nothing(started: Path) -> None:
    assert stage.restoration("prepare") == ""
    fill_cache(started / ".dvc/cache")
    (started / ".dvc/cache/files/md5/22/bb").unlink()
    assert stage.restoration("prepare") == ""


def test_outputs_the_present_lock_names_come_back_without_touching_it(started: Path) -> None:
    fill_cache(started / ".dvc/cache")
    assert stage.restoration("prepare").endswith("To get them back: dvc checkout prepare")


def test_where_only_the_committed_lock_names_them_it_comes_back_first(started: Path) -> None:
    fill_cache(started / "elsewhere")
    (started / ".dvc/config").write_text("[cache]\n    dir = ../elsewhere\n")
    (started / "dvc.lock").unlink()
    assert stage.restoration("prepare").endswith("git checkout dvc.lock && dvc checkout prepare")


def test_another_python_is_told_so_in_one_line(tmp_path: Path) -> None:
    variables = {"PATH": "/usr/bin", "PIPELINE_ENV": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"expected the one of {tmp_path}" in line
    assert "make env" in line


def test_the_repository_is_found_from_a_folder_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "conf/lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "conf/lora")
    assert environment.root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert environment.root() == Path("/elsewhere")


@pytest.mark.parametrize("name", ["prepare", "dedup_split", "tokenize_pack"])
def test_stages_that_need_no_torch_do_not_import_it(name: str) -> None:
    code = f"import sys, stages.{name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("device", "launcher", "processes", "expected"),
    [("cpu", "local", 1, 0), ("auto", "local", None, 1), ("cuda", "torchrun", 4, 4), ("cuda", "ray", 4, 0)],
)
def test_a_stage_leases_a_gpu_for_each_process_it_starts_itself(
    device: str, launcher: str, processes: int | None, expected: int
) -> None:
    p = SimpleNamespace(numerics=SimpleNamespace(device=Device(device)))
    if processes:
        p.train = SimpleNamespace(processes=processes)
    assert stage.gpus(p, SimpleNamespace(launcher=Launcher(launcher))) == expected
