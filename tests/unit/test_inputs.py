"""The user's file is refused while DVC composes, when an experiment would not find it."""

import subprocess
from pathlib import Path

import pytest

from stages.lib import inputs
from stages.lib.errors import ConfigError, PipelineError
from stages.lib.schema.data import Source
from tests.data_settings import settings


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "my.jsonl").write_text("{}")
    return tmp_path


def test_a_missing_file_is_refused(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: found 'absent\.jsonl', which does not exist\. Expected"):
        inputs.check_visible("absent.jsonl", repository)


def test_a_missing_file_that_dvc_knows_can_be_pulled(repository: Path) -> None:
    (repository / "absent.jsonl.dvc").write_text("outs: []")
    with pytest.raises(ConfigError, match="dvc pull"):
        inputs.check_visible("absent.jsonl", repository)


def test_an_untracked_file_is_refused_with_what_to_type(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"`dvc add my\.jsonl && git add my\.jsonl\.dvc`, or .*whole path, /"):
        inputs.check_visible("my.jsonl", repository)


@pytest.mark.parametrize("added", ["my.jsonl", "my.jsonl.dvc"])
def test_a_file_that_git_has_or_dvc_has_is_found_everywhere(repository: Path, added: str) -> None:
    (repository / "my.jsonl.dvc").write_text("outs: []")
    subprocess.run(["git", "add", added], cwd=repository, check=True)
    inputs.check_visible("my.jsonl", repository)


def test_a_file_of_a_folder_that_dvc_has_is_found_everywhere(repository: Path) -> None:
    (repository / "data/raw").mkdir(parents=True)
    (repository / "data/raw/my.jsonl").write_text("{}")
    (repository / "data/raw.dvc").write_text("outs: []")
    with pytest.raises(ConfigError, match="neither git nor DVC tracks"):
        inputs.check_visible("data/raw/my.jsonl", repository)
    subprocess.run(["git", "add", "data/raw.dvc"], cwd=repository, check=True)
    inputs.check_visible("data/raw/my.jsonl", repository)


def test_every_data_file_of_a_folder_must_be_known_to_git_or_dvc(repository: Path) -> None:
    (repository / "data/raw/more").mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl", ".gitkeep", "README.md"):
        (repository / "data/raw" / name).write_text("{}")
    subprocess.run(["git", "add", "data/raw/a.jsonl", "data/raw/.gitkeep"], cwd=repository, check=True)
    with pytest.raises(ConfigError, match=r"found 'data/raw/more/b\.jsonl', which neither.*`dvc add data/raw && "):
        inputs.check_visible("data/raw", repository)
    (repository / "data/raw/more/b.jsonl.dvc").write_text("outs: []")
    subprocess.run(["git", "add", "data/raw/more/b.jsonl.dvc"], cwd=repository, check=True)
    inputs.check_visible("data/raw", repository)


def test_a_pattern_is_named_below_the_folder_that_dvc_depends_on(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"found the pattern '\*\.jsonl', but DVC depends.*data\.sources"):
        inputs.check_visible("*.jsonl", repository)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "absent.jsonl"}, r"absent\.jsonl: not found.*data\.sources\.mine\.path"),
        ({"path": "/absent.jsonl"}, r"data\.sources\.mine\.path: found '/absent\.jsonl', which does not exist"),
        ({"path": "*.csv"}, r"holds no file of a known kind"),
        ({}, r"data\.path: found 'raw', which does not exist"),
    ],
)
def test_the_files_of_every_local_source_are_looked_for(repository: Path, entry: dict[str, str], message: str) -> None:
    path = "raw" if not entry else "."
    (repository / "raw.dvc" if entry else repository / "other.dvc").write_text("")
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    with pytest.raises(PipelineError, match=message):
        inputs.check(settings(path=path, sources={"mine": entry}), repository)
    inputs.check(settings(path=".", sources={"mine": {"path": "my.jsonl"}}), repository)
    inputs.check(settings(path="raw", source=Source.python_docs, packages=["a"]), repository)


def test_a_whole_path_is_found_everywhere(repository: Path) -> None:
    inputs.check_visible(str(repository / "my.jsonl"), repository)
