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


STAGES = ("tokenize_pack", "qlora_train", "evaluate", "merge")


def repeated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kind: str,
    otherwise: tuple[str, ...] = (),
    on_threads: tuple[str, ...] = (),
    failing: tuple[str, ...] = (),
) -> Reproduction:
    """An experiment run again on a machine that differs in one kind, by stages that only write a dvc.lock.

    Args: otherwise: the stages that give other bytes here. on_threads: those that do until run on the recorded threads.
    """
    recorded = {name: {"cmd": name, "outs": [{"path": name, "md5": "1"}]} for name in STAGES}

    def clone(experiment: Experiment, folder: Path) -> None:
        folder.mkdir()
        (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": recorded}))
        (folder / "params.yaml").write_text(PARAMS)

    def run(folder: Path, name: str, threads: str | None = None) -> str:
        if name in failing:
            return "no room"
        (folder / reproduction.PREDICTIONS).parent.mkdir(parents=True, exist_ok=True)
        (folder / reproduction.PREDICTIONS).touch()
        is_other = name in otherwise or (name in on_threads and threads is None)
        entry = {"cmd": name, "outs": [{"path": name, "md5": "2" if is_other else "1"}]}
        lock = reproduction._lock(folder) | {name: entry}
        (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
        files.write_json(folder / f"metrics/{name}.json", {"loss": 2.0 if is_other else 1.0})
        return ""

    recorded_on, here = ({"threads": {"threads": "1"}} | {kind: {kind: n}} for n in ("1", "2"))
    for name, replacement in (
        ("clone", clone),
        ("run", run),
        ("bring_data", lambda folder: None),
        ("described", lambda name: dict.fromkeys(STAGES, recorded_on)),
        ("_described", lambda runs, name: here),
        ("figures", lambda experiment, folder, recorded: [EQUAL]),
    ):
        monkeypatch.setattr(reproduction, name, replacement)
    params = {"data": {"source": "file", "sources": {}}}
    experiment = Experiment("ours", "0", "0", params, STAGES, {name: {"loss": 1.0} for name in STAGES}, {})
    return reproduction.reproduce(experiment, tmp_path / "again", say=lambda line: None)


def test_a_stage_that_fails_after_others_differed_within_noise_is_no_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = repeated(tmp_path, monkeypatch, kind="hardware", otherwise=("qlora_train", "evaluate"), failing=("merge",))
    assert found.verdict() == "not reproduced: merge failed"
    assert reproduction.report(found)[-2] == "merge failed: no room"
    assert not found.is_exact()


def test_a_stage_that_fails_after_equal_ones_is_no_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = repeated(tmp_path, monkeypatch, kind="hardware", failing=("evaluate",))
    assert (found.first, found.verdict(), found.is_exact()) == (None, "not reproduced: evaluate failed", False)


@pytest.mark.parametrize("later", ["evaluate", "merge"])
def test_recorded_threads_that_bring_back_one_stage_say_nothing_of_a_later_one_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    found = repeated(tmp_path, monkeypatch, kind="threads", on_threads=("qlora_train",))
    assert found.verdict() == "reproduced bit for bit with the recorded threads (1)"
    assert (found.is_exact(), found.metrics) == (True, {})
    shutil.rmtree(tmp_path / "again")
    found = repeated(tmp_path, monkeypatch, kind="threads", on_threads=("qlora_train",), otherwise=(later,))
    assert found.first is not None
    assert (found.first.stage, found.threads, found.is_exact()) == (later, None, False)


@pytest.mark.parametrize(
    ("otherwise", "verdict"),
    [
        (("qlora_train", "evaluate", "merge"), "reproduced within noise"),
        (("evaluate",), "reproduced within noise"),
        (("merge",), "not reproduced: differs first in merge (hardware)"),
    ],
)
def test_predictions_say_nothing_of_files_that_are_made_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, otherwise: tuple[str, ...], verdict: str
) -> None:
    assert repeated(tmp_path, monkeypatch, kind="hardware", otherwise=otherwise).verdict() == verdict


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


def test_a_plain_repro_is_looked_for_past_commits_that_lack_a_parameter(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(upstream)
    for text in ("seed: 3\n", PARAMS):
        (upstream / "params.yaml").write_text(text)
        (upstream / "dvc.lock").write_text(f"# results of {text}")
        git(upstream, "add", "-A")
        git(upstream, "commit", "-qm", text)
    with pytest.raises(ConfigError, match="no commit of a branch or tag"):
        reproduction.commit_of("repro-00000000")


def test_data_whose_name_is_not_ascii_is_brought_into_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "données.csv.dvc").touch()
    git(tmp_path, "add", "-A")
    asked: list[str] = []
    monkeypatch.setattr(reproduction, "dvc", lambda folder, *arguments: asked.extend(arguments) or 0)
    reproduction.bring_data(tmp_path)
    assert asked == ["checkout", "données.csv.dvc"]


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
