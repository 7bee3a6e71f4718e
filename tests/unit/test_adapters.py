"""The adapter: where it sits, and how it is written down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib import adapters, files, models, numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)
ATTENTION, MLP = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Callable[[], Any]:
    return lambda: models.load_base(tiny_model_dir, NF4)


@pytest.mark.parametrize(
    ("wanted", "last_parts", "n"),
    [
        ("all-linear", sorted([*ATTENTION, *MLP]), 14),
        ("attention", ATTENTION, 8),
        ("mlp", MLP, 6),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"], 4),
    ],
)
def test_targets_are_named_by_group_or_by_name(
    load: Callable[[], Any], wanted: Any, last_parts: list[str], n: int
) -> None:
    base = load()
    targets = adapters.resolve_targets(base, wanted)
    assert len(targets) == n
    assert adapters.short_names(base, targets) == last_parts


def test_a_single_layer_is_named_in_full(load: Callable[[], Any]) -> None:
    base = load()
    targets = adapters.resolve_targets(base, ["0.mlp.up_proj"])
    assert targets == ["model.layers.0.mlp.up_proj"]
    assert adapters.short_names(base, targets) == targets


@pytest.mark.parametrize("wanted", [["query"], ["q_proj", "query"], ["lm_head"], ["proj"]])
def test_names_that_match_nothing_are_refused_even_beside_others_that_do(
    load: Callable[[], Any], wanted: list[str]
) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: \['{wanted[-1]}'\] of .*'down_proj', 'gate_proj'"):
        adapters.add_adapter(load(), Lora(4, 4.0, 0.0, wanted))


def test_the_saved_configuration_is_sorted_and_names_no_machine(load: Callable[[], Any], tmp_path: Path) -> None:
    model = adapters.add_adapter(load(), Lora(4, 8.0, 0.0, ["v_proj", "q_proj"]))
    adapters.save(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = files.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "models/base"
    assert str(tmp_path.anchor + "tmp") not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    described = adapters.describe(model, Lora(4, 8.0, 0.0, ["v_proj", "q_proj"]), numerics.resolve(NF4))
    assert described["modules"] == [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    assert described["scaling"] == 2.0
    assert described["parameters"] == sum(p.numel() for p in adapters.trainable(model).values())
