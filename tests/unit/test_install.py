"""Which command line installs the environment, on the four kinds of machine."""

from pathlib import Path

import pytest

from commands.install import has_cpu_build, torch_options, uv_install


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
    assert command[-6:] == ["--constraints", "requirements.lock", "--requirements", "pyproject.toml", "--extra", "dev"]


def test_links_without_a_cpu_build_of_torch_are_not_relied_on(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert not has_cpu_build([str(tmp_path)])
    assert torch_options(has_gpu=False, links=[str(tmp_path)], has_cpu_build=False) == ["--torch-backend", "cpu"]
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert has_cpu_build([f"file://{tmp_path}"])


def test_the_lock_names_no_local_build_and_no_registry() -> None:
    lock = (Path(__file__).resolve().parents[2] / "requirements.lock").read_text()
    assert "torch==2.13.0\n" in lock
    assert "://" not in lock
