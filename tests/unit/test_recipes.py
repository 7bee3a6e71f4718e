"""The recipes of conf/experiment: each composes, says where its numbers come from, and fits the GPU it is made for."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from commands.params import composed
from stages.lib import estimate, numerics
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.train import Train
from tests.conftest import ROOT

RECIPES = {path.stem: path for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))}
ON_GPU = [name for name in RECIPES if name.startswith("gpu_")]
SHARED = [name for name in RECIPES if name.startswith("fsdp_")]
COMMIT = "base_model.revision=" + 40 * "0"  # in place of what `make pin` asks the hub for
SHAPES: dict[str, PretrainedConfig] = {  # config.json of the bases on the hub, as far as it decides memory
    "qwen3_4b": Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "qwen3_8b": Qwen3Config(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "mistral_7b": MistralConfig(vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
    "llama3_1_8b": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
}  # fmt: skip
USABLE = 0.93  # of a card's memory: the driver, and a screen, hold the rest


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
    base = Path(next(path for path in (ROOT / "conf/base_model").glob("*.yaml") if is_base(path, p))).stem
    usable = USABLE * int(re.findall(r"\d+", name)[0]) * estimate.GIB
    assert needed(p, base, batch=1, labelled=1.0).expected <= usable  # every token an answer
    assert needed(p, base, batch=1, labelled=0.5).high <= usable
    assert needed(p, base, batch=2, labelled=1.0).high > usable


def is_base(path: Path, p: dict[str, Any]) -> bool:
    return OmegaConf.load(path).id == p["base_model"]["id"]


def needed(p: dict[str, Any], base: str, *, batch: int, labelled: float) -> estimate.Range:
    tokens = batch * p["train"]["batch_size"] * p["pack"]["max_tokens"]
    return estimate.memory(
        skeleton(base),
        typed(Lora, p["lora"]),
        typed(Train, p["train"]),
        typed(Numerics, p["numerics"]),
        numerics.Resolved("cuda", "bfloat16", "float32", "strict", ""),
        estimate.Load(tokens, round(labelled * tokens)),
    ).total()


@functools.cache
def skeleton(base: str) -> Any:
    return estimate.without_weights(SHAPES[base])


def typed(schema: Any, values: dict[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
