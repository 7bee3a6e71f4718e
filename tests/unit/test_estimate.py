"""The memory estimate, and what it refuses before a model is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hydra_plugins.pipeline_schema import check_sections
from stages import qlora_train, tokenize_pack
from stages.lib import adapters, config, estimate, limits, models, numerics, packing
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Method
from stages.lib.schema.numerics import Device, Quantization
from stages.lib.schema.train import Optimizer
from tests.conftest import ROOT

DEFAULTS = config.load(qlora_train.Params, path=ROOT / "params.yaml")
CPU = numerics.Resolved("cpu", "float32", "float32", "strict", "")
LOAD = estimate.Load(tokens=1024, labelled=200)


def total(base: Path, *, load: estimate.Load = LOAD, lora: dict[str, Any] | None = None,
          train: dict[str, Any] | None = None, numbers: dict[str, Any] | None = None) -> estimate.Range:  # fmt: skip
    p = DEFAULTS
    return estimate.memory(
        estimate.skeleton(base),
        replace(p.lora, **(lora or {})),
        replace(p.train, **(train or {})),
        replace(p.numerics, **(numbers or {})),
        CPU,
        load,
        room=0,
    ).total()


def test_the_skeleton_is_the_model_without_its_weights(tiny_model_dir: Path) -> None:
    skeleton = estimate.skeleton(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert sum(p.numel() for p in skeleton.parameters()) == sum(p.numel() for p in model.parameters())  # tied once


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "attention", "modules_to_save": ["embed_tokens", "lm_head"]},
        {"method": Method.dora},
        {"method": Method.ia3, "target_modules": ["k_proj", "v_proj", "down_proj"]},
        {"method": Method.prompt_tuning},
        {"method": Method.prefix_tuning},
        {"method": Method.full},
        {"method": Method.full, "last_layers": 1},
    ],
    ids=str,
)
def test_trained_parameters_are_those_that_the_adapter_has(tiny_model_dir: Path, changes: dict[str, Any]) -> None:
    lora = replace(DEFAULTS.lora, r=8, **changes)
    model = adapters.add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_dir), lora)
    expected = sum(parameter.numel() for parameter in adapters.trainable(model).values())
    assert estimate.trainable_parameters(estimate.skeleton(tiny_model_dir), lora) == expected


@pytest.mark.parametrize("is_double", [False, True])
def test_4_bit_weights_take_what_bitsandbytes_takes(tiny_model_dir: Path, is_double: bool) -> None:
    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=is_double)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=recipe, device_map={"": "cpu"})
    layers = dict(model.named_modules())
    stored = weights = 0.0
    for name in adapters.linear_layers(model):
        state = layers[name].weight.quant_state
        stored += layers[name].weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if is_double else 0)
        weights += layers[name].in_features * layers[name].out_features
    per_weight = estimate.bytes_per_weight(Quantization.nf4, is_double=is_double, compute=4)
    assert stored / weights == pytest.approx(per_weight, rel=0.01)


def test_more_of_anything_takes_more_and_checkpointing_and_4_bit_take_less(tiny_model_dir: Path) -> None:
    usual = total(tiny_model_dir).expected
    assert total(tiny_model_dir, load=estimate.Load(2048, 200)).expected > usual
    assert total(tiny_model_dir, load=estimate.Load(1024, 400)).expected > usual
    assert total(tiny_model_dir, lora={"r": 64}).expected > usual
    assert total(tiny_model_dir, lora={"dropout": 0.1}).expected > usual
    assert total(tiny_model_dir, numbers={"quantization": Quantization.none}).expected > usual
    assert total(tiny_model_dir, train={"gradient_checkpointing": True}).expected < usual
    assert total(tiny_model_dir, train={"optimizer": Optimizer.adamw_8bit}).expected < usual


def test_a_cpu_that_keeps_dense_values_of_4_bit_weights_holds_both(tiny_model_dir: Path) -> None:
    p, model = DEFAULTS, estimate.skeleton(tiny_model_dir)
    kept, not_kept = (estimate.memory(model, p.lora, p.train, p.numerics, CPU, LOAD, room=room) for room in (2**40, 0))
    weights = sum(n_out * n_in for n_out, n_in in estimate.linear_layers(model).values())
    assert kept.total().expected - not_kept.total().expected == 4 * weights
    assert not_kept.sampling["unpacked"].expected == 4 * weights  # all at once only while samples are written


def test_the_largest_batch_that_shuffling_may_draw_counts() -> None:
    packs = [
        packing.Pack(input_ids=[1] * n, position_ids=list(range(n)), labels=[-100] * (n - k) + [1] * k, row_ids=["a"])
        for n, k in ((4, 1), (8, 2), (6, 5))
    ]
    assert estimate.heaviest(packs, 2) == estimate.Load(tokens=14, labelled=7)


def test_a_control_groups_limit_counts_where_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/memory.max").write_text("5000\n")
    (tmp_path / "job/step/memory.max").write_text("max\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    assert list(estimate.cgroup_limits(tmp_path, tmp_path / "own").values()) == [5000]


def started(base: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    """Run qlora_train's main() on packs of the tiny model; loading that model is a failure of the test."""
    monkeypatch.chdir(folder)
    Path("models").mkdir()
    Path("models/base").symlink_to(base)
    pack = packing.Pack(input_ids=[1] * 64, position_ids=list(range(64)), labels=[1] * 64, row_ids=["a"])
    monkeypatch.setattr(packing, "read", lambda folder: [pack] * 4)
    monkeypatch.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    qlora_train.main(replace(DEFAULTS, **changes))


def test_more_memory_than_the_machine_has_is_refused_before_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "machine_memory", lambda device: (2**20, "physical memory"))
    with pytest.raises(
        ConfigError,
        match=r"estimated [\d.]+ GiB .* of physical(.|\n)*activations +[\d.]+ GiB(.|\n)*train.batch_size=1",
    ):
        started(tiny_model_dir, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"target_modules": ["no_such"]}}, r"lora\.target_modules: \['no_such'\].*q_proj"),
        ({"lora": {"modules_to_save": ["no_such"]}}, r"lora\.modules_to_save: \['no_such'\]"),
        ({"lora": {"method": Method.full}}, r"numerics\.quantization: found nf4 with lora\.method=full"),
        ({"train": {"optimizer": Optimizer.paged_adamw_8bit}}, r"train\.optimizer: found paged_adamw_8bit"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], message: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {name: replace(getattr(DEFAULTS, name), **values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=message):
        started(tiny_model_dir, monkeypatch, tmp_path, **sections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"method": Method.full}}, r"numerics\.quantization: found nf4"),
        ({"train": {"optimizer": Optimizer.adamw_8bit}, "numerics": {"device": Device.cpu}}, r"train\.optimizer"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_while_dvc_composes(changes: dict[str, Any], message: str) -> None:
    sections = {name: getattr(DEFAULTS, name) for name in ("lora", "train", "numerics")}
    check_sections(**sections)
    with pytest.raises(ConfigError, match=message):
        check_sections(**sections | {name: replace(sections[name], **values) for name, values in changes.items()})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=0", "lora.r: found 0, expected a positive rank"),
        ("train.learning_rate=-1.0e-4", "train.learning_rate: found -0.0001, expected above 0"),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_parameters_are_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(qlora_train.Params, [override], path=ROOT / "params.yaml")


def test_rows_longer_than_the_model_has_positions_for_are_refused(tiny_model_dir: Path, in_tmp: Path) -> None:
    Path("models").mkdir()
    Path("models/base").symlink_to(tiny_model_dir)
    p = config.load(tokenize_pack.Params, ["pack.max_tokens=1025"], path=ROOT / "params.yaml")
    with pytest.raises(ConfigError, match=r"pack\.max_tokens: found 1025, expected at most 1024"):
        tokenize_pack.main(p)
    limits.check_length(tiny_model_dir, 1024)
