"""make compare: better, worse, or cannot tell, over test rows and over seeds."""

from pathlib import Path

import numpy as np
import pytest

from commands import compare
from stages.lib import config
from stages.lib.experiments import differences
from stages.lib.experiments.kept import Experiment
from tests.evaluate_settings import settings
from tests.kept_experiments import experiment, keep, predictions

ROWS = np.random.default_rng(0).uniform(0.2, 0.8, 60)


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experiment, "read", lambda self, path: "stages: {}")
    monkeypatch.setattr(differences, "code", lambda one, other: "")
    monkeypatch.setattr(config, "load", lambda schema: schema(settings()))


def shifted(by: float) -> list[float]:
    return np.clip(ROWS + by, 0, 1).tolist()


@pytest.mark.parametrize(
    ("by", "status", "said"),
    [(0.1, 0, "B is better than A"), (-0.1, 1, "B is worse than A"), (0.0, 0, "B cannot be told from A")],
)
def test_the_exit_status_is_one_only_where_b_is_worse(tmp_path, monkeypatch, capsys, by, status, said) -> None:
    a, b = experiment("a", r=8), experiment("b", r=32)
    keep(monkeypatch, tmp_path, {"a": (a, predictions(shifted(0))), "b": (b, predictions(shifted(by)))})
    assert compare.main(["a", "b"]) == status
    out = capsys.readouterr().out
    assert said in out
    assert "lora.r: 8 -> 32" in out
    assert "Seeds: A 42 and B 42" in out


def test_what_two_trainings_show_and_other_seeds_do_not_cannot_be_told(tmp_path: Path, monkeypatch, capsys) -> None:
    moved = {"a": (0.0, 0.1, -0.1), "b": (0.1, -0.1, 0.02)}  # of three seeds; the first ones are compared
    found = {
        f"{name}{seed}": (experiment(f"{name}{seed}", r=8 if name == "a" else 32, seed=seed), predictions(shifted(by)))
        for name, shifts in moved.items()
        for seed, by in enumerate(shifts)
    }
    keep(monkeypatch, tmp_path, found)
    assert compare.main(["a0", "b0"]) == 0
    out = capsys.readouterr().out
    trainings, seeds = out.split("Rows and seeds, A 0, 1, 2 and B 0, 1, 2")
    assert trainings.count("better") > 0
    assert "better" not in seeds
    assert "B cannot be told from A, over seeds." in seeds


def test_another_seed_on_other_data_is_no_repetition(tmp_path: Path, monkeypatch, capsys) -> None:
    found = {
        name: (experiment(name, r=r, seed=seed, data=data), predictions(shifted(0)))
        for name, r, seed, data in (("a", 8, 1, "d1"), ("a2", 8, 2, "d2"), ("b", 32, 1, "d1"), ("b2", 32, 2, "d1"))
    }
    keep(monkeypatch, tmp_path, found)
    assert compare.main(["a", "b"]) == 0
    assert "Seeds: A 1 and B 1, 2" in capsys.readouterr().out


def test_experiments_on_other_test_rows_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    rows = predictions(shifted(0)), predictions(shifted(0), start=100)
    keep(monkeypatch, tmp_path, {name: (experiment(name), found) for name, found in zip("ab", rows, strict=True)})
    assert compare.main(["a", "b"]) == 2
    assert "none of them the same" in capsys.readouterr().err


LOCK = """
stages:
  tokenize_pack:
    deps: [{{path: data/splits, md5: s}}, {{path: stages/lib/packing.py, md5: {code}}}]
    params: {{params.yaml: {{pack: {{max_tokens: {tokens}}}}}}}
    outs: [{{path: data/packed, md5: p{code}{tokens}}}]
  qlora_train:
    deps: [{{path: data/packed, md5: p{code}{tokens}}}]
    outs: [{{path: models/adapter, md5: a{code}{tokens}}}]
"""


@pytest.mark.parametrize(
    ("lock", "params", "files"),
    [
        ({"code": "x", "tokens": 256}, ("pack.max_tokens",), ()),
        ({"code": "y", "tokens": 512}, (), ("stages/lib/packing.py",)),
    ],
)
def test_the_first_stage_that_differs_names_its_cause_and_later_ones_their_input(
    monkeypatch, lock, params, files
) -> None:
    locks = {"a": LOCK.format(code="x", tokens=512), "b": LOCK.format(**lock)}
    monkeypatch.setattr(Experiment, "read", lambda self, path: locks[self.name])
    first, second = differences.stages(*(experiment(name, stages=("tokenize_pack", "qlora_train")) for name in "ab"))
    assert (first.name, first.params, first.files, first.inputs) == ("tokenize_pack", params, files, ())
    assert (second.name, second.params, second.files, second.inputs) == ("qlora_train", (), (), ("data/packed",))
