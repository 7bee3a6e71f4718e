"""The frame of a stage: another python, a full disk, a fault of ours, libraries kept apart."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib import environment
from tests.conftest import ROOT, run

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
        "runtime: {threads: null, log_level: info, tracking_uri: 'http://127.0.0.1:9'}\nsweep: {id: null}\n"
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
