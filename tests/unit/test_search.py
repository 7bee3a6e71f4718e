"""A search on a stand-in for DVC: what is proposed, what is pruned, what is left to the next driver."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from stages.lib import live
from stages.lib.errors import ConfigError, ExternalError, Pruned
from stages.lib.experiments import kept, running, search
from stages.lib.experiments.points import Point
from stages.lib.schema.sweep import Direction, Pruning, Sampler, Search, Sweep

SPACE = {"lora.r": [2, 4, 8], "train.learning_rate": {"low": 1.0e-5, "high": 1.0e-2, "log": True}}
SEARCH = Search("val/loss/tuned", Direction.minimize, 6, 0, Sampler.tpe, SPACE, pruning=None)


def sweep(**changed: Any) -> Sweep:
    return Sweep("s", "evaluate", {"train.epochs": 2}, {}, [], dataclasses.replace(SEARCH, **changed))


def loss(values: dict[str, Any]) -> float:
    return abs(math.log10(values["train.learning_rate"]) + 3) + 1 / values["lora.r"]


class Dvc:
    """Runs a point at once: its loss falls in three evaluations to that of its values."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.ran: list[Point] = []
        self.fails = False
        self.pause = 0.0  # after an evaluation, long enough for the driver to look

    def run(self, point: Point, sweep_id: str, target: str, *, source: Path, workers: int) -> running.Outcome:
        log = running.folder(sweep_id) / f"{point.name}.log"
        if point.name in self.done:
            return running.Outcome(point, "done", "", log, 0.0)
        self.ran.append(point)
        if self.fails:
            return running.Outcome(point, "failed", "out of memory", log, 1.0)
        ending = loss(point.values)
        for number in (1, 2, 3):
            live._write(point.name, live.Told([ending + 3 - i for i in range(1, number + 1)], 3))
            time.sleep(self.pause)
            if number < 3 and (Path("runs") / point.name / "stop").exists():
                return running.Outcome(point, "pruned", f"stopped at step {10 * number}", log, 1.0)
        self.done[point.name] = ending
        return running.Outcome(point, "done", "", log, 1.0)

    def find(self, name: str) -> Any:
        metrics = {"qlora_train": {"val/loss/tuned": self.done[name]}, "prepare": {"rows/in": 3}}
        return kept.Experiment(name, "", "", {}, ("qlora_train",), metrics, {})


@pytest.fixture
def dvc(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Dvc:
    stand_in = Dvc()
    monkeypatch.setattr(running, "run", stand_in.run)
    monkeypatch.setattr(running, "start_folder", lambda sweep_id: in_tmp)
    monkeypatch.setattr(search, "signatures", lambda points, target: {"": {"evaluate": "its own"}})
    monkeypatch.setattr(kept, "find", stand_in.find)
    monkeypatch.setattr(search, "POLL_SECONDS", 0.002)
    return stand_in


def study(p: Sweep, state: str = "state") -> optuna.Study:
    return search.open_study(p, state)


def ended(p: Sweep, **options: Any) -> list[search.Ended]:
    return list(search.run(study(p), p, "state", **options))


def values(p: Sweep) -> list[dict[str, Any]]:
    return [trial.params for trial in study(p).trials]


def test_as_many_trials_as_wanted_are_run_and_each_is_an_experiment_with_what_the_sweep_fixes(dvc: Dvc) -> None:
    p = sweep()
    found = ended(p)
    assert [(each.number, each.outcome.status, each.value) for each in found] == [
        (number, "done", dvc.done[each.outcome.point.name]) for number, each in enumerate(found)
    ]
    assert len(found) == 6
    assert {point.values["train.epochs"] for point in dvc.ran} == {2}
    assert ended(p) == []


def test_a_search_that_was_killed_goes_on_as_it_would_have(dvc: Dvc) -> None:
    p = sweep()
    ended(p)
    whole = values(p)
    (Path("runs/sweeps/s") / "study.journal").unlink()
    dvc.done.clear()
    one = search.run(study(p), p, "state")
    next(one)
    next(one)
    one.close()
    no_process = 1 << 22
    study(p).ask().set_user_attr("driver", [*search._driver()[:2], no_process, 0.0])  # killed before it told the result
    assert len(ended(p)) == 4
    assert values(p) == whole


def test_drivers_of_one_search_propose_different_points(dvc: Dvc) -> None:
    p = sweep(sampler=Sampler.random)
    rates = []
    for _ in range(3):  # each of a driver of its own, before any was told
        trial = study(p).ask()
        rates.append(search._proposed(trial, p, "state").values["train.learning_rate"])
    assert len(set(rates)) == 3


def test_a_training_that_lags_is_asked_to_stop_and_is_no_experiment(dvc: Dvc) -> None:
    dvc.pause = 0.03
    p = sweep(trials=6, pruning=Pruning(keep=0.5, after_trials=2, after_evaluations=0))
    found = ended(p)
    pruned = [each for each in found if each.outcome.status == "pruned"]
    assert pruned
    assert all(each.outcome.point.name not in dvc.done and each.value is None for each in pruned)
    assert all("stopped at step" in each.outcome.reason for each in pruned)
    states = [trial.state for trial in study(p).trials]
    assert states.count(optuna.trial.TrialState.PRUNED) == len(pruned)
    best = min(dvc.done.values())
    assert study(p).best_value == best


def test_where_more_is_better_a_high_loss_still_is_what_lags(dvc: Dvc) -> None:
    dvc.pause = 0.03
    p = sweep(direction=Direction.maximize, pruning=Pruning(keep=0.5, after_trials=2, after_evaluations=0))
    found = ended(p)
    losses = {
        status: [loss(each.outcome.point.values) for each in found if each.outcome.status == status]
        for status in ("done", "pruned")
    }
    assert min(losses["done"]) < min(losses["pruned"])


def test_a_point_that_is_there_is_not_run_again(dvc: Dvc) -> None:
    p = sweep(space={"lora.r": [4], "train.learning_rate": [0.001]}, trials=3)
    found = ended(p, workers=2)
    assert [each.outcome.status for each in found] == ["done"] * 3
    assert len(dvc.ran) == 1


def test_three_failures_in_a_row_end_a_search_and_retry_tries_their_points_again(dvc: Dvc) -> None:
    p, dvc.fails = sweep(), True
    assert [each.outcome.reason for each in ended(p)] == ["out of memory"] * 3
    assert search.failed(study(p)) == [0, 1, 2]
    assert [line.split(": ")[1] for line in search.reasons(study(p))] == ["out of memory"] * 3
    dvc.fails = False
    again = ended(p, retry=True)
    assert [each.outcome.point for each in again[:3]] == dvc.ran[:3]
    assert len(again) == 6
    assert search.failed(study(p)) == []


def test_points_that_are_added_to_a_search_are_tried_too_and_none_twice(dvc: Dvc) -> None:
    one, two = ({"train.learning_rate": rate} for rate in (0.0002, 0.0004))
    ended(dataclasses.replace(sweep(trials=2), points=[one]))
    both = dataclasses.replace(sweep(trials=4), points=[one, two])
    ended(both)
    queued = [
        trial.system_attrs["fixed_params"] for trial in study(both).trials if "fixed_params" in trial.system_attrs
    ]
    assert queued == [one, two]


def test_points_are_tried_first_and_choices_may_be_lists(dvc: Dvc) -> None:
    space = SPACE | {"lora.target_modules": ["all-linear", ["q_proj", "v_proj"]]}
    first = {"lora.r": 8, "train.learning_rate": 0.001, "lora.target_modules": ["q_proj", "v_proj"]}
    p = dataclasses.replace(sweep(space=space, trials=2), points=[first])
    ended(p)
    assert dvc.ran[0].values == {"train.epochs": 2} | first


def test_changed_code_begins_a_new_study_and_more_trials_do_not(dvc: Dvc) -> None:
    ended(sweep(trials=2))
    assert len(study(sweep(trials=9)).trials) == 2
    assert len(study(sweep(trials=2), state="other code").trials) == 0


def test_a_trial_of_another_machine_is_left_alone_until_that_is_said_to_be_lost(dvc: Dvc) -> None:
    p = sweep(trials=1)
    study(p).ask().set_user_attr("driver", ["elsewhere", "/repo", 1, 0.0])
    assert ended(p) == []
    assert [each.number for each in ended(p, lost_host="elsewhere")] == [0]


def test_an_unknown_metric_is_answered_with_those_near_it(dvc: Dvc) -> None:
    with pytest.raises(ConfigError, match=r"found val/loss/tune, expected .* val/loss/tuned"):
        ended(sweep(metric="val/loss/tune"))


def test_a_journal_whose_last_line_is_torn_is_read_up_to_it(dvc: Dvc) -> None:
    p = sweep(trials=2)
    ended(p)
    with (Path("runs/sweeps/s") / "study.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')
    assert len(study(p).trials) == 2
    assert len(ended(sweep(trials=3))) == 1


@pytest.mark.slow
def test_a_database_keeps_a_search_as_the_journal_does(dvc: Dvc) -> None:
    p, url = sweep(trials=3), f"sqlite:///{Path.cwd()}/trials.db"
    ended(p)
    list(search.run(search.open_study(p, "state", url), p, "state"))
    in_database = search.open_study(p, "state", url)
    assert [(trial.params, trial.value) for trial in in_database.trials] == [
        (trial.params, trial.value) for trial in study(p).trials
    ]


def test_a_database_that_cannot_be_opened_is_refused_without_its_password(in_tmp: Path) -> None:
    with pytest.raises(ExternalError, match="OPTUNA_STORAGE") as refused:
        search.storage("s", "nosuchdatabase://user:secret@host/trials")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trials": 0}, "sweep.search.trials: found 0"),
        ({"space": {}}, "sweep.search.space: found {}"),
        ({"space": {"lora.r": []}}, "lora.r: a list of values, each once"),
        ({"space": {"lora.r": [4, 4]}}, "lora.r: a list of values, each once"),
        ({"space": {"lora.r": {"low": 4}}}, "lora.r: found"),
        ({"space": {"lora.r": {"low": 4, "high": 2}}}, "low 4 is not below high 2"),
        ({"space": {"lora.r": {"low": 0, "high": 2, "log": True}}}, "a low above 0"),
        ({"space": {"lora.r": {"low": 1, "high": "x"}}}, "are numbers"),
    ],
)
def test_a_space_that_nothing_can_be_drawn_from_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changed)


def test_a_first_point_outside_the_space_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep.points: found \['lora.r=3'\]"):
        dataclasses.replace(sweep(), points=[{"lora.r": 3}])


def test_a_training_stops_when_asked_but_not_at_its_last_step(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "x")
    live.tell([2.0, math.nan], 4)
    live.ask_to_stop("x", "it lags")
    live.obey(9, 9)
    with pytest.raises(Pruned, match="step 5 of 9, as it was asked: it lags"):
        live.obey(5, 9)
    assert live.heard("x") == live.Told([2.0, None], 4, stopped_at=5, reason="it lags")


def test_of_several_processes_of_a_training_the_first_one_tells(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "x")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        live.tell([2.0 + int(rank)], 4)
    assert live.heard("x") == live.Told([2.0], 4)


def test_a_request_that_an_earlier_attempt_left_does_not_stop_this_one(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "x")
    live.ask_to_stop("x", "it lags")
    live.start()
    live.obey(5, 9)
    assert live.heard("x") is None
