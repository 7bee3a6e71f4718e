"""From a sweep's file to the experiments DVC shall run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from commands.params import composed
from commands.sweep import main, state
from stages.lib import config
from stages.lib.errors import ConfigError
from stages.lib.experiments import points, running
from stages.lib.schema.sweep import Sweep
from tests.conftest import ROOT


def sweep(**values: Any) -> Sweep:
    return Sweep(**{"id": "s", "target": "evaluate", "fixed": {}, "grid": {}, "points": [], "search": None, **values})


def test_every_combination_is_a_point_and_whole_seeds_come_first() -> None:
    found = points.expand(sweep(fixed={"a.b": 1}, grid={"seed": [1, 2], "lora.r": [4, 16]}), state=lambda _: "x")
    assert [point.overrides() for point in found] == [
        ["a.b=1", "lora.r=4", "seed=1"],
        ["a.b=1", "lora.r=16", "seed=1"],
        ["a.b=1", "lora.r=4", "seed=2"],
        ["a.b=1", "lora.r=16", "seed=2"],
    ]


def test_points_by_themselves_follow_the_grid_and_stand_alone_without_one() -> None:
    alone = points.expand(sweep(points=[{"lora.r": 64}]), state=lambda _: "x")
    assert [point.values for point in alone] == [{"lora.r": 64}]
    both = points.expand(sweep(grid={"lora.r": [4]}, points=[{"lora.r": 64}]), state=lambda _: "x")
    assert [point.values for point in both] == [{"lora.r": 4}, {"lora.r": 64}]


def test_a_point_keeps_its_name_when_others_join_and_in_any_order_of_keys() -> None:
    few = points.expand(sweep(grid={"lora.r": [4], "seed": [1]}), state=lambda _: "x")
    many = points.expand(sweep(grid={"seed": [1, 2], "lora.r": [16, 4]}), state=lambda _: "x")
    assert few[0].name in {point.name for point in many}
    assert len({point.name for point in many}) == 4


def test_another_state_or_another_value_is_another_point() -> None:
    names = {points.point("s", {"lora.r": r}, state).name for r in (4, 16) for state in ("x", "y")}
    assert len(names) == 4


def test_points_that_dvc_has_and_points_named_twice_are_not_run() -> None:
    found = points.expand(sweep(points=[{"lora.r": 4}, {"lora.r": 4}, {"lora.r": 8}]), state=lambda _: "x")
    assert points.missing(found, {found[2].name}) == [found[0]]


@pytest.mark.parametrize(
    "value",
    [
        8,
        1.8e-3,
        "all-linear",
        True,
        None,
        ["q_proj", "v_proj"],
        {"parameters": 96, "summary": 0},
        'two "words", a comma',
        "1e-4",
        "null",
    ],
)
def test_hydra_reads_the_value_back(value: Any) -> None:
    (override,) = points.Point("n", {"lora.r": value}).overrides()
    assert OverridesParser.create().parse_override(override).value() == value


def test_points_share_the_stages_whose_parameters_they_agree_on() -> None:
    small, other = (points.Point(f"r{r}", {"data.fraction": 0.5, "lora.r": r}) for r in (4, 16))
    large = points.Point("large", {"data.fraction": 1.0, "lora.r": 4})
    chain = ["base_model", "prepare", "dedup_split", "tokenize_pack", "qlora_train", "evaluate"]
    of_small, of_other, of_large = points.signatures([small, other, large], "evaluate").values()
    assert [name for name in chain if of_small[name] == of_other[name]] == chain[:4]
    assert [name for name in chain if of_small[name] == of_large[name]] == ["base_model"]


def test_the_choice_of_a_file_counts_for_its_section_and_an_experiment_for_all() -> None:
    of_file = points.Point("file", {"lora": "dora"})
    of_experiment = points.Point("experiment", {"experiment": "alpaca"})
    found = points.signatures([of_file, of_experiment], "qlora_train")
    assert found["file"]["base_model"] == "{}" != found["file"]["qlora_train"]
    assert found["experiment"]["base_model"] != "{}"


def test_a_few_points_show_every_value() -> None:
    grid = {"lora.r": [4, 16, 64], "train.learning_rate": [2.0e-4, 6.0e-4, 1.8e-3]}
    every = points.expand(sweep(grid=grid), state=lambda _: "x")
    few = points.covering(every)
    assert len(few) == 5
    assert {word for point in few for word in point.overrides()} == {w for point in every for w in point.overrides()}


def test_the_state_is_that_of_code_data_and_parameters_the_target_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stages", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    params = config.values()
    before = points.state_of(params, "evaluate")
    assert points.state_of({**params, "merge": None}, "evaluate") == before  # no stage up to evaluate reads it
    assert points.state_of({**params, "seed": 43}, "evaluate") != before
    code = tmp_path / "stages/lib/packing.py"
    code.write_text(code.read_text() + "\n# touched\n")
    assert points.state_of(params, "evaluate") != before


def test_a_point_is_another_when_a_file_it_chooses_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stages", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/benchmarks").mkdir(parents=True)
    rows, dora = tmp_path / "rows.jsonl", tmp_path / "conf/lora/dora.yaml"
    rows.write_text("{}\n")
    p = sweep(fixed={"data": "local", "data.path": str(rows)})
    plain, chosen = ({**p.fixed, **own} for own in ({"lora.r": 4}, {"lora": "dora"}))
    before = [state(p)(values) for values in (plain, chosen)]
    assert state(p)({**plain, "lora.r": 8}) == before[0]
    rows.write_text("{}\n{}\n")
    added = [state(p)(values) for values in (plain, chosen)]
    assert set(added).isdisjoint(before)
    dora.write_text(dora.read_text() + "dropout: 0.5\n")
    edited = [state(p)(values) for values in (plain, chosen)]
    assert (edited[0], edited[1] != added[1]) == (added[0], True)


def test_a_sweep_that_only_fixes_values_is_one_point() -> None:
    assert [point.values for point in points.expand(sweep(fixed={"lora.r": 4}), state=lambda _: "x")] == [{"lora.r": 4}]


def test_no_point_at_a_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"J \(--workers\): found 0"), running.pool(0):
        pass


@pytest.mark.parametrize("path", sorted((ROOT / "conf/sweep").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_conf_composes(path: Path) -> None:
    composition = composed([f"sweep={path.stem}"])
    found = composition["sweep"]
    assert found["id"] == path.stem
    sections = {key.split(".")[0] for key in {**found["fixed"], **found["grid"]}}
    assert sections <= composition.keys()


def test_a_sweep_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none"]) == 2
    assert "sweep.id: found null in conf/sweep/none.yaml" in capsys.readouterr().err


def test_a_grid_of_what_is_no_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.grid: found \['lora\.r'\], expected a list"):
        sweep(grid={"lora.r": 4})
