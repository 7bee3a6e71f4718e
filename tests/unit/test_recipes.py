"""The recipes of conf/experiment: each composes, says where its numbers come from, and fits the GPU it is made for."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from commands.params import composed
from stages.lib import estimate, numerics
from stages.lib.experiments import devices, shapes
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.train import Train
from tests.conftest import ROOT

RECIPES = {path.stem: path for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))}
ON_GPU = [name for name in RECIPES if name.startswith("gpu_")]
SHARED = [name for name in RECIPES if name.startswith("fsdp_")]
COMMIT = "base_model.revision=" + 40 * "0"  # in place of what `make pin` asks the hub for


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@functools.cache
def recipe(name: str, *overrides: str) -> dict[str, Any]:
    return composed([f"experiment={name}", *overrides, *([COMMIT] if name in [*ON_GPU, *SHARED] else [])])


@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_composes(name: str, tmp_path: Path) -> None:
    for file in ("train.csv", "test.csv"):
        (tmp_path / file).touch()
    own_files = [f"data.path={tmp_path}"] if name == "banking77" else []
    assert recipe(name, *own_files)["checked"]


@pytest.mark.parametrize(
    "choice",
    [f"{kind}={path.stem}" for kind in ("merge", "export") for path in sorted((ROOT / "conf" / kind).iterdir())],
)
def test_every_way_to_merge_and_to_export_composes(choice: str) -> None:
    assert composed([choice])["checked"]


@pytest.mark.parametrize("name", ["qlora_paper", "alpaca", "conservative", "small_data", *ON_GPU, *SHARED])
def test_a_recipe_says_where_its_numbers_come_from(name: str) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}", RECIPES[name].read_text())


def test_there_is_a_recipe_for_each_common_gpu_size() -> None:
    assert sorted(ON_GPU) == sorted(f"gpu_{size}gb" for size in (8, 12, 16, 24, 40, 80))


def test_the_papers_settings_are_those_of_the_paper() -> None:
    p = recipe("qlora_paper")
    lora = {key: p["lora"][key] for key in ("r", "alpha", "dropout", "target_modules")}
    assert lora == {"r": 64, "alpha": 16, "dropout": 0.1, "target_modules": "all-linear"}
    assert p["train"]["batch_size"] * p["train"]["gradient_accumulation_steps"] == 16
    assert (p["train"]["learning_rate"], p["train"]["max_grad_norm"]) == (2e-4, 0.3)


def test_the_alpaca_settings_are_those_people_compare() -> None:
    p = recipe("alpaca")
    lora = {key: p["lora"][key] for key in ("r", "alpha", "dropout", "target_modules")}
    assert lora == {"r": 64, "alpha": 16, "dropout": 0.1, "target_modules": "attention"}
    assert p["pack"]["max_tokens"] == 1024
    assert (p["train"]["batch_size"], p["train"]["gradient_accumulation_steps"]) == (2, 16)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_recipe_for_a_gpu_fits_it_and_twice_its_batch_would_not(name: str) -> None:
    p = recipe(name)
    usable = devices.USABLE * int(re.findall(r"\d+", name)[0]) * estimate.GIB
    assert needed(p, batch=1, labelled=1.0).expected <= usable  # every token an answer
    assert needed(p, batch=1, labelled=0.5).high <= usable
    assert needed(p, batch=2, labelled=1.0).high > usable


def needed(p: dict[str, Any], *, batch: int, labelled: float) -> estimate.Range:
    tokens = batch * p["train"]["batch_size"] * p["pack"]["max_tokens"]
    return estimate.memory(
        shapes.by_name(p["base_model"]["id"]),
        typed(Lora, p["lora"]),
        typed(Train, p["train"]),
        typed(Numerics, p["numerics"]),
        numerics.Resolved("cuda", "bfloat16", "float32", "strict", ""),
        estimate.Load(tokens, round(labelled * tokens)),
    ).total()


def typed(schema: Any, values: dict[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
