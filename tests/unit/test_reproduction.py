"""Two runs of one experiment held beside each other: where they part, why, and what is said about it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import reproduce
from stages.lib import comparison, environment, files, stage, tracking
from stages.lib.errors import ConfigError
from stages.lib.experiments import reproduction
from stages.lib.experiments.kept import Experiment
from stages.lib.experiments.reproduction import Difference, Reproduction
from tests.conftest import ROOT, git

PARAMS = """
seed: 3
data: {path: rows.jsonl}
dedup: {contamination: {benchmarks: benchmarks}}
prompt: {template: chat.jinja}
"""
MADE = {"data/packed", "models/adapter"}


def entry(**changed: str) -> dict[str, Any]:
    """A stage's entry of a dvc.lock."""
    md5 = {"stages/train.py": "1", "requirements.lock": "2", "data/packed": "3", "data/raw/rows.jsonl": "4"} | changed
    return {
        "cmd": md5.pop("cmd", "python -m stages.train"),
        "deps": [{"path": path, "md5": found} for path, found in md5.items() if path not in ("r", "out")],
        "params": {"params.yaml": {"lora": {"r": md5.get("r", "8")}}},
        "outs": [{"path": "models/adapter", "md5": md5.get("out", "5")}],
    }


@pytest.mark.parametrize(
    ("changed", "kind", "line"),
    [
        ({"stages/train.py": "x"}, "code", "stages/train.py is another"),
        ({"stages/new.py": "x"}, "code", "stages/new.py is new here"),
        ({"cmd": "python x"}, "code", "command: python -m stages.train when recorded, python x here"),
        ({"requirements.lock": "x"}, "package", "requirements.lock is another"),
        ({"data/raw/rows.jsonl": "x"}, "data", "data/raw/rows.jsonl is another"),
        ({"data/packed": "x"}, "data", "data/packed is another"),
        ({"r": "16"}, "parameters", "lora.r: 8 when recorded, 16 here"),
    ],
)
def test_an_input_that_differs_is_named_by_its_kind(changed: dict[str, str], kind: str, line: str) -> None:
    assert reproduction.inputs_between(entry(), entry(**changed), MADE) == {kind: [line]}


def test_with_equal_inputs_the_machine_explains_and_with_others_the_inputs_do() -> None:
    machine = {"hardware": ["cpu: old when recorded, new here"]}
    assert reproduction.why("train", entry(), entry(out="x"), MADE, ["base_model"], machine) == machine
    found = reproduction.why("train", entry(), entry(**{"stages/train.py": "x"}), MADE, ["base_model"], machine)
    assert list(found) == ["code"]


def test_a_stage_that_fetches_explains_other_bytes_by_what_it_got() -> None:
    assert list(reproduction.why("base_model", entry(), entry(out="x"), MADE, ["base_model"], {})) == ["base"]
    assert list(reproduction.why("prepare", entry(), entry(out="x"), MADE, ["prepare"], {})) == ["data"]


def test_what_nothing_explains_is_said_to_be_unknown() -> None:
    assert list(reproduction.why("train", entry(), entry(out="x"), MADE, [], {})) == ["unknown"]


def test_outputs_are_held_to_their_recorded_hashes() -> None:
    assert reproduction.changed(entry(), entry()) == {}
    assert reproduction.changed(entry(), entry(out="x")) == {"models/adapter": "5"}


def line(low: float, high: float, p_value: float) -> comparison.Line:
    found = comparison.Difference((low + high) / 2, low, high, 100, 10, 90, p_value, p_value)
    return comparison.Line("chat", "loss", {"ours": 1.0, "theirs": 1.0}, {"theirs": found})


EQUAL, HIGHER = line(-0.1, 0.1, 0.5), line(-0.3, -0.1, 0.001)
ROUNDED = Difference("qlora_train", {"models/adapter": []}, {"hardware": ["cpu: another"]})
CHANGED = Difference("qlora_train", {"models/adapter": []}, {"code": ["stages/qlora_train.py is another"]})


@pytest.mark.parametrize(
    ("first", "figures", "threads", "verdict"),
    [
        (None, [], None, "reproduced bit for bit"),
        (ROUNDED, [EQUAL], "3", "reproduced bit for bit with the recorded threads (3)"),
        (ROUNDED, [EQUAL], None, "reproduced within noise"),
        (ROUNDED, [EQUAL, HIGHER], None, "not reproduced: differs first in qlora_train (hardware)"),
        (ROUNDED, [], None, "not reproduced: differs first in qlora_train (hardware)"),
        (CHANGED, [EQUAL], None, "not reproduced: differs first in qlora_train (code)"),
    ],
)
def test_the_verdict_follows_from_hashes_causes_and_figures(
    first: Difference | None, figures: list[comparison.Line], threads: str | None, verdict: str
) -> None:
    found = Reproduction(Path("again"), first=first, figures=figures, threads=threads)
    assert found.verdict() == verdict


def test_only_what_is_not_as_locked_is_described_of_packages(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.1\npyarrow==0.2 ; python_version > '3'\nno-such-package==1.0\n")
    found = environment.describe(lock)
    assert {"python", "libc", "numpy", "pyarrow"} == set(found["package"])
    assert found["package"]["numpy"].endswith("(locked: 0.1)")
    assert len(environment.unlocked(found)) == 2


def test_environments_are_compared_by_kind() -> None:
    recorded = {"package": {"python": "3.11", "numpy": "9 (locked: 8)"}, "threads": {"threads": "3"}, "hardware": {}}
    here = {"package": {"python": "3.11"}, "threads": {"threads": "2"}, "hardware": {}}
    assert environment.differences(recorded, here) == {
        "package": ["numpy: 9 (locked: 8) when recorded, as locked here"],
        "threads": ["threads: 3 when recorded, 2 here"],
    }


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A git repository with one experiment of DVC's."""
    folder = tmp_path / "upstream"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "params.yaml").write_text(PARAMS)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "params")
    baseline = git(folder, "rev-parse", "HEAD").strip()
    git(folder, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/small-rank", baseline)
    return folder


def test_an_experiment_that_only_a_git_remote_has_is_fetched(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "-q", str(upstream), "clone")  # which does not bring refs/exps
    monkeypatch.chdir(tmp_path / "clone")
    assert reproduction.locate("small-rank").params["seed"] == 3


def test_a_name_nobody_knows_ends_with_status_2_and_the_names_near_it(
    upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(upstream)
    assert reproduce.main(["smal-rank"]) == 2
    said = capsys.readouterr().err
    assert "found 'smal-rank'" in said
    assert "near it: small-rank" in said


def test_an_experiment_without_results_is_refused_before_anything_runs(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(upstream)
    with pytest.raises(ConfigError, match="found no results of any stage"):
        reproduction.chosen(reproduction.locate("small-rank"), None, upstream)


def test_a_plain_repro_is_found_by_the_commit_with_its_parameters_and_code(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(upstream)
    code, lock = upstream / "stages/train.py", upstream / "dvc.lock"
    code.parent.mkdir()
    revisions = []
    for text in ("the code that ran\n", "other code\n"):
        code.write_text(text)
        lock.write_text(f"# results of {text}")
        git(upstream, "add", "-A")
        git(upstream, "commit", "-qm", text)
        revisions.append(git(upstream, "rev-parse", "HEAD").strip())
    code.write_text("the code that ran\n")
    name = tracking.key(yaml.safe_load(PARAMS))
    assert reproduction.commit_of(name) == revisions[0]
    with pytest.raises(ConfigError, match="no commit of a branch or tag"):
        reproduction.commit_of("repro-00000000")


@pytest.mark.parametrize(("shift", "verdict"), [(0.001, "cannot tell"), (0.5, "worse")])
def test_answers_are_compared_with_the_recorded_ones_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, verdict: str
) -> None:
    """Losses move up and down by little, or all up by much."""
    folder, cached = tmp_path / "again", tmp_path / "cached"
    (folder / "reports/evaluation").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", folder)
    for path, moved in ((cached, 0.0), (folder / reproduction.PREDICTIONS, shift)):
        signs = [1 if shift > 0.1 or i % 2 else -1 for i in range(30)]
        rows = [predicted(i, 4.0 + moved * sign) for i, sign in enumerate(signs)]
        files.write_rows(path, rows, comparison.PREDICTIONS)
    monkeypatch.setattr(stage, "cached", lambda md5: {"predictions.parquet": cached})
    experiment = Experiment("ours", "0", "0", {}, ("evaluate",), {}, {"reports/evaluation": "1.dir"})
    loss = reproduction.figures(experiment, folder, {})[0]
    assert (loss.measure, loss.verdict("theirs")) == ("loss", verdict)


def predicted(number: int, nll: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(comparison.PREDICTIONS.names)
    return row | {"arm": "tuned", "id": str(number), "task": "chat", "nll": nll, "n_tokens": 4, "n_bytes": 9}


def test_the_report_ends_with_the_verdict_and_says_what_is_not_proven() -> None:
    found = Reproduction(Path("again"), ["prepare"], {"base_model": "no hub"}, metrics={"prepare/rows": (3.0, 4.0)})
    assert reproduction.report(found) == [
        "environment: as recorded",
        "metrics that differ: 1",
        "  prepare/rows: 3.0 when recorded, 4.0 here",
        "base_model: restored, not run; nothing is proven about it",
        "reproduced bit for bit (1 stages: prepare)",
    ]
