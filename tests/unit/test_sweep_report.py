"""make sweep-report on experiments whose truth is known: all layers matter, rank does not."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import sweep_report
from stages.lib import config
from stages.lib.experiments import kept, results, sweep_page
from stages.lib.experiments.results import Absent
from tests.evaluate_settings import settings
from tests.kept_experiments import experiment, keep, predictions

Found = dict[str, tuple[Any, list[dict[str, Any]]]]
REPORT = "runs/sweeps/grid/report.html"


def grid(seeds: tuple[int, ...] = (42, 43, 44)) -> Found:
    """r 2 and 8, attention 0.4 and all layers 0.7 of 1, seeds that move it by 0.02."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.1, 40)
    found = {}
    for r, modules, seed in itertools.product((2, 8), ("attention", "all-linear"), seeds):
        name = f"grid-{r}-{modules}-{seed}"
        made = experiment(name, r=r, modules=modules, seed=seed, trainable=1e5 * r * (1 + 2 * (modules != "attention")))
        mean = 0.7 if modules == "all-linear" else 0.4
        scores = mean + hard + rng.normal(0, 0.02) + rng.normal(0, 0.05, 40)
        found[name] = (made, predictions(np.clip(scores, 0, 1).tolist()))
    return found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(config, "load", lambda schema: schema(settings()))
    return tmp_path


def test_the_report_says_what_matters_and_recommends_the_cheapest_of_the_best(root, monkeypatch, capsys) -> None:
    keep(monkeypatch, root, grid())
    assert sweep_report.main(["grid"]) == 0
    said = capsys.readouterr().out
    assert "12 of 12 experiments in 4 settings" in said
    assert "lora.target_modules matters: all-linear is better than attention by 0.3" in said
    assert "lora.r: no difference is told between 2 and 8" in said
    assert "lora.target_modules matters more than lora.r" in said
    page = (root / REPORT).read_text()
    assert page.count(">recommended<") == 1
    assert page.split(">recommended<")[0].rstrip().rsplit('class="what">', 1)[1].startswith("r 2, all-linear")
    assert page.count(">worse<") == 3  # both of attention, and attention less all-linear


def test_equal_results_give_equal_bytes(root, monkeypatch) -> None:
    keep(monkeypatch, root, grid())
    for name in ("one.html", "two.html"):
        assert sweep_report.main(["grid", "--out", str(root / name)]) == 0
    assert (root / "one.html").read_bytes() == (root / "two.html").read_bytes()


def test_of_one_seed_each_the_report_says_what_is_not_known(root, monkeypatch, capsys) -> None:
    keep(monkeypatch, root, grid(seeds=(42,)))
    assert sweep_report.main(["grid"]) == 0
    assert "Every setting was trained once." in capsys.readouterr().out
    assert "Noise of seeds: not known." in (root / REPORT).read_text()


def test_a_point_that_was_run_again_counts_once_the_later_one(root, monkeypatch, capsys) -> None:
    found = grid()
    earlier = {"grid-old": (experiment("grid-old", r=2, seed=42, data="d0"), predictions([0.0] * 40))}
    keep(monkeypatch, root, earlier | found)
    assert sweep_report.main(["grid"]) == 0
    assert "12 of 13 experiments in 4 settings" in capsys.readouterr().out
    assert "run again since with other code or data: grid-old" in (root / REPORT).read_text()


@pytest.mark.parametrize(
    ("mode", "alphas", "times"), [("fixed", (2, 32), 4), ("fixed", (16, 16), 0.25), ("rslora", (4, 4), 1)]
)
def test_how_far_a_step_goes_at_another_rank(mode, alphas, times) -> None:
    low, high = (
        sweep_page.step({"lora.r": r, "lora.alpha": alpha, "lora.alpha_mode": mode})
        for r, alpha in zip((2, 32), alphas, strict=True)
    )
    assert high / low == pytest.approx(times)


def test_points_that_failed_are_listed_with_their_reason(root, monkeypatch) -> None:
    keep(monkeypatch, root, grid())
    log = root / "runs/sweeps/grid/grid-lost.log"
    log.parent.mkdir(parents=True)
    log.write_text("starting\nqlora_train: lora.r: found 0, expected a positive rank\n\n")
    assert sweep_report.main(["grid"]) == 0
    page = (root / REPORT).read_text()
    assert "grid-lost" in page
    assert "lora.r: found 0, expected a positive rank" in page


def test_a_point_that_was_begun_and_dvc_does_not_have_runs_was_pruned_failed_or_was_left() -> None:
    rows = {
        "a": ("FINISHED", ""),
        "b": ("FAILED", "DataError: no rows"),
        "c": ("KILLED", ""),
        "e": ("KILLED", "Pruned: stopped at step 5"),
        "f": ("FINISHED", ""),  # between two stages
        "g": ("FAILED", "of the attempt before"),
    }
    logs = {"a": "done", "c": "last words", "d": "half", "g": "step 3"}
    assert results.absent(["a"], ["g"], [], rows, logs) == [
        Absent("b", "failed", "DataError: no rows"),
        Absent("c", "killed", "last words"),
        Absent("d", "unfinished", "half"),
        Absent("e", "pruned", "Pruned: stopped at step 5"),
        Absent("f", "unfinished", ""),
        Absent("g", "running", "step 3"),
    ]


def test_a_point_that_failed_is_not_listed_once_its_values_came_out_under_other_code() -> None:
    def outcome(name: str, status: str, r: int) -> dict[str, Any]:
        return {"name": name, "status": status, "reason": "", "values": {"lora.r": r}}

    ended = [outcome("old", "failed", 4), outcome("new", "done", 4), outcome("other", "failed", 8)]
    ended += [outcome("gone", "done", 16)]
    found = results.absent(["new"], [], ended, {"old": ("FAILED", "")}, {"old": "", "other": ""})
    assert [(each.name, each.status) for each in found] == [("gone", "removed"), ("other", "failed")]


def test_trainings_of_another_state_of_the_code_are_named(root, monkeypatch, capsys) -> None:
    stages = ("tokenize_pack", "qlora_train")
    keep(monkeypatch, root, {name: (replace(made, stages=stages), rows) for name, (made, rows) in grid().items()})

    def lock(revision: str) -> str:
        code = {"path": "stages/lib/packing.py", "md5": revision[-1]}
        deps = [code, {"path": "data/packed", "md5": revision}]  # what a stage made may differ: parameters do
        old = {"deps": [{"path": "stages/lib/merging.py", "md5": revision}]}  # of an earlier run
        packed = {"outs": [{"path": "data/packed"}]}
        return json.dumps({"stages": {"tokenize_pack": packed, "qlora_train": {"deps": deps}, "merge": old}})

    monkeypatch.setattr(kept, "at_revision", lambda revision: lambda path: lock(revision))
    assert sweep_report.main(["grid"]) == 0
    told = "differ in more than their parameters: stages/lib/packing.py."
    assert told in capsys.readouterr().out
    assert told in (root / REPORT).read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["other"], "found no experiment with sweep.id=other, expected one of: grid"),
        (["grid", "--metric", "parameters/beauty"], "expected one of parameters/field_f1, parameters/loss"),
    ],
)
def test_what_cannot_be_reported_is_said_with_what_there_is(root, monkeypatch, capsys, arguments, told) -> None:
    keep(monkeypatch, root, grid())
    assert sweep_report.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_trainings_without_a_common_test_row_are_refused(root, monkeypatch, capsys) -> None:
    found = grid()
    name = next(iter(found))
    found[name] = (found[name][0], predictions([0.5] * 40, start=100))
    keep(monkeypatch, root, found)
    assert sweep_report.main(["grid"]) == 2
    assert "no test row in common" in capsys.readouterr().err
