"""Comparing params.yaml with conf/: a fault in conf/ is one message, and two comparisons at once do not meet."""

import sys
from pathlib import Path

import pytest

from commands.params import composed
from tests.conftest import run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 16\n", "rank"),
        ("r: -1\nalpha: 1\ndropout: 0.0\ntarget_modules: mlp\n", "found -1"),
        ("r: [\n", "r16.yaml"),
    ],
    ids=["unknown key", "out of range", "no YAML"],
)
def test_a_fault_in_conf_is_one_message(repo: Path, text: str, message: str) -> None:
    (repo / "conf/lora/r16.yaml").write_text(text)
    done = run(repo, sys.executable, "-m", "commands.differences")
    assert done.returncode == 2
    assert done.stderr.startswith("differences: conf/ does not compose: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_composing_writes_nothing_into_the_repository(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    before = sorted(repo.rglob("*"))
    assert composed()["seed"] == 42
    assert sorted(path for path in repo.rglob("*") if "__pycache__" not in path.parts) == before
