"""What the log of a point says about it, and how its experiment comes into the repository."""

import shutil
from pathlib import Path

import pytest

from stages.lib.experiments import running
from tests.conftest import git

CHAIN = ["base_model", "prepare", "qlora_train", "evaluate"]
FAILED = """Reproducing experiment 's-1'
Running stage 'qlora_train':
> python -m stages.qlora_train
  0%| 1/9
qlora_train: lora.target_modules: found ['no_such'], expected
layers of the model
ERROR: failed to reproduce 'qlora_train': failed to run: python -m stages.qlora_train, exited with {status}
"""


def test_a_failed_point_is_told_in_the_words_of_its_stage() -> None:
    status, reason = running.ending(FAILED.format(status=2))
    assert status == "failed"
    assert reason == "qlora_train: lora.target_modules: found ['no_such'], expected layers of the model"


@pytest.mark.parametrize(("code", "signal"), [(-9, "SIGKILL"), (137, "SIGKILL"), (143, "SIGTERM"), (-2, "SIGINT")])
def test_a_killed_stage_is_told_from_a_failed_one(code: int, signal: str) -> None:
    assert running.ending(FAILED.format(status=code)) == ("killed", f"qlora_train: {signal}")


def test_a_traceback_is_told_by_its_last_line() -> None:
    said = (
        "Traceback\n  File x\nRuntimeError: no\nERROR: failed to reproduce 'evaluate': failed to run: x, exited with 1"
    )
    assert running.ending(said) == ("failed", "RuntimeError: no")


def test_a_point_that_does_not_compose_is_told_in_the_words_of_hydra() -> None:
    said = "ERROR: Value 'abc' of type 'str' could not be converted to Integer\n    full_key: lora.r\n"
    status, reason = running.ending(said)
    assert status == "failed"
    assert reason.startswith("Value 'abc'")
    assert "lora.r" in reason


def test_a_log_that_just_ends_is_that_of_a_killed_dvc() -> None:
    assert running.ending("Running stage 'evaluate':\n  half a line")[0] == "killed"
    assert running.ending("") == ("killed", "said nothing")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("", CHAIN),
        ("Stage 'base_model' didn't change, skipping\n", CHAIN),
        ("Stage 'base_model' didn't change, skipping\nRunning stage 'prepare':\n", CHAIN[1:]),
        (
            "Stage 'base_model' is cached - skipping run\nRunning stage 'prepare':\nRunning stage 'evaluate':\n",
            CHAIN[2:],
        ),
    ],
)
def test_a_point_may_be_at_the_stage_its_log_names_last_or_at_those_it_does_not_name(
    said: str, left: list[str], tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(said)
    assert running.unfinished(tmp_path / "log", CHAIN) == left
    assert running.unfinished(tmp_path / "none", CHAIN) == CHAIN


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a repository with two experiments that the repository does not have."""
    root = tmp_path / "root"
    git(tmp_path, "init", "-q", "-b", "main", str(root))
    git(root, "commit", "-q", "--allow-empty", "-m", "first")
    copy = root / "runs/sweeps/s/at-1"
    git(tmp_path, "clone", "-q", "--shared", str(root), str(copy))
    for name in ("s-1", "s-2"):
        git(copy, "commit", "-q", "--allow-empty", "-m", name)
        git(copy, "update-ref", f"refs/exps/ab/{'c' * 38}/{name}", "HEAD")
    (copy / ".dvc/tmp").mkdir(parents=True)
    (copy / ".dvc/tmp/start.json").write_text("{}")
    monkeypatch.setenv("DVC_ROOT", str(root))
    return copy


def names(root: Path) -> list[str]:
    return git(root, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").split()


def test_an_experiment_that_was_removed_does_not_come_back(copied: Path) -> None:
    root = copied.parents[3]
    running.collect(copied, "s-1")
    assert names(root) == ["s-1", "s-2"]
    git(root, "update-ref", "-d", f"refs/exps/ab/{'c' * 38}/s-1")
    running.collect(copied, "s-2")
    assert names(root) == ["s-2"]


def test_the_copies_that_may_hold_what_a_killed_driver_left_are_known(copied: Path) -> None:
    assert running.copies() == [copied]


def test_a_repository_that_was_copied_has_no_edits_until_there_are_some(tmp_path: Path) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    git(tmp_path, "init", "-q", "-b", "main", str(first))
    (first / "notes.md").write_text("committed")
    git(first, "add", "-A")
    git(first, "commit", "-qm", "first")
    for key, value in (("user.name", "A. Person"), ("user.email", "a@example.invalid")):
        git(first, "config", key, value)
    shutil.copytree(first, copy)
    assert running.edits_of(copy) == ""
    (copy / "notes.md").write_text("edited")
    assert git(copy, "show", f"{running.edits_of(copy)}:notes.md") == "edited"
