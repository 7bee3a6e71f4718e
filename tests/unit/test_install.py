"""Which command line installs the environment, on the four kinds of machine."""

import os
import platform
import sys
from pathlib import Path

import pytest

from commands import env_vllm
from commands.install import has_cpu_build, torch_options, uv_install, variables
from tests.conftest import run


@pytest.mark.parametrize(
    ("has_gpu", "links", "options"),
    [
        (True, [], []),
        (True, ["wheels"], []),
        (False, ["wheels"], ["--find-links", "wheels"]),
        (False, [], ["--torch-backend", "cpu"]),
    ],
)
def test_torch_comes_without_cuda_exactly_where_there_is_no_gpu(
    has_gpu: bool, links: list[str], options: list[str]
) -> None:
    assert torch_options(has_gpu=has_gpu, links=links, has_cpu_build=bool(links)) == options
    command = uv_install(Path(".venv/bin/python"), options)
    assert command[:3] == [".venv/bin/uv", "pip", "install"]
    wanted = "--requirements pyproject.toml --extra dev --extra ray --extra search --extra sbom --extra serve".split()
    assert command[-len(wanted) - 2 :] == ["--constraints", "requirements.lock", *wanted]


def cpu_wheel(version: str = "2.13.0", python: str = "", machine: str = "") -> str:
    python = python or f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"torch-{version}+cpu-{python}-{python}-manylinux_2_28_{machine or platform.machine()}.whl"


@pytest.mark.parametrize(
    "other",
    [
        cpu_wheel().replace("+cpu", ""),
        cpu_wheel(version="2.12.0"),
        cpu_wheel(python="cp27"),
        cpu_wheel(machine="sparc"),
    ],
)
def test_links_without_a_cpu_build_of_the_locked_torch_for_this_python_are_not_relied_on(
    tmp_path: Path, other: str
) -> None:
    (tmp_path / other).touch()
    assert not has_cpu_build([str(tmp_path)])
    assert torch_options(has_gpu=False, links=[str(tmp_path)], has_cpu_build=False) == ["--torch-backend", "cpu"]
    (tmp_path / cpu_wheel()).touch()
    assert has_cpu_build([f"file://{tmp_path}"])


def test_on_a_gpu_uv_does_not_see_wheels_among_which_a_cpu_build_would_win() -> None:
    environ = {"UV_FIND_LINKS": "wheels", "UV_INDEX_URL": "registry"}
    assert variables(environ, has_gpu=True) == {"UV_INDEX_URL": "registry"}
    assert variables(environ, has_gpu=False) == environ


@pytest.mark.slow
def test_a_registry_out_of_reach_is_one_message_and_nothing_counts_as_installed(repo: Path) -> None:
    (repo / ".venv").mkdir()
    (repo / ".venv/installed").touch()  # of an earlier lock
    os.utime(repo / ".venv/installed", (0, 0))
    nowhere = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    done = run(repo, "make", "env", f"PYTHON={sys.executable}", PIP_FIND_LINKS="", UV_FIND_LINKS="", **nowhere)
    assert done.returncode != 0
    assert done.stderr.count("install: the line above ended with status 1") == 1
    assert "Is the package registry reachable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (repo / ".venv/installed").exists()


def test_the_lock_names_no_local_build_and_no_registry() -> None:
    lock = (Path(__file__).resolve().parents[2] / "requirements.lock").read_text()
    assert "torch==2.13.0\n" in lock
    assert "://" not in lock


def test_llmcompressor_gets_an_environment_of_its_own_by_its_own_lock() -> None:
    create, fill = env_vllm.steps(["--find-links", "wheels"])
    assert create[-1] == ".venv-llmcompressor"
    assert fill[:5] == [".venv/bin/uv", "pip", "install", "--quiet", "--python"]
    assert fill[5] == ".venv-llmcompressor/bin/python"
    assert fill[-6:] == [
        *("--find-links", "wheels"),
        *("--constraints", "requirements-llmcompressor.lock", "llmcompressor", "torch"),
    ]
