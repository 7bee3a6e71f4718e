"""merging: the merged weights are W + (alpha / r) B A, and what is saved needs nothing else."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stages.lib import adapters, chat, fidelity, files, merging, models, others
from stages.lib.errors import ConfigError, ModelError
from stages.lib.requantizing import Requantized
from stages.lib.schema.lora import AlphaMode, Lora, Method
from stages.lib.schema.merge import Base, Combination, Dtype
from stages.lib.schema.numerics import Quantization
from tests.conftest import ROOT, run, throwaway_tokenizer
from tests.exported import MERGE, NUMERICS, make_adapter

PROJECTION = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    make_adapter(tiny_model_dir, folder)
    return folder


@pytest.mark.parametrize("into", list(Base))
def test_merged_is_the_base_plus_alpha_over_r_times_b_a(tiny_model_dir: Path, adapter: Path, into: Base) -> None:
    lora = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{PROJECTION}"
    update = 8 / 4 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    if into is Base.original:
        base = load_file(tiny_model_dir / "model.safetensors")[f"{PROJECTION}.weight"].float()
    else:
        base = models.load_base(tiny_model_dir, NUMERICS, dense=True).get_submodule(PROJECTION).weight
    merged = merging.merge(tiny_model_dir, adapter, replace(MERGE, base=into), NUMERICS)
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(merged.get_submodule(PROJECTION).weight, base + update, rtol=0, atol=1e-6)


def test_the_two_bases_differ(tiny_model_dir: Path, adapter: Path) -> None:
    weights = [
        merging.merge(tiny_model_dir, adapter, replace(MERGE, base=into), NUMERICS).get_submodule(PROJECTION).weight
        for into in Base
    ]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_saved_merge_is_reloaded_as_the_trained_model(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path, dtype: Dtype
) -> None:
    merged = merging.merge(tiny_model_dir, adapter, replace(MERGE, dtype=dtype), NUMERICS)
    merging.save(merged, tiny_model_dir, tmp_path)
    tuned = models.load_tuned(tiny_model_dir, adapter, NUMERICS)
    expected = fidelity.reference(fidelity.of(tuned), [[1, 5, 9, 30, 7], [1, 5, 80]])
    close = fidelity.compare(expected, fidelity.of(models.load_dense(tmp_path, NUMERICS)))
    assert close.kl_mean < {Dtype.float32: 1e-6, Dtype.float16: 1e-6, Dtype.bfloat16: 1e-4}[dtype]
    assert files.read_json(tmp_path / "config.json")["dtype"] == str(dtype)


def test_a_saved_merge_tokenizes_and_stops_as_the_base_and_names_no_place(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    merging.save(merging.merge(tiny_model_dir, adapter, MERGE, NUMERICS), tiny_model_dir, folder)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    tokenizers = [chat.load_tokenizer(place) for place in (tiny_model_dir, folder)]
    assert chat.stop_ids(tokenizers[0], tiny_model_dir) == chat.stop_ids(tokenizers[1], folder)
    assert not [path for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert not list(folder.glob("adapter*"))


@pytest.mark.parametrize(
    ("method", "quantization"), [(Method.lora, "nf4"), (Method.dora, "nf4"), (Method.ia3, "nf4"), (Method.full, "none")]
)
def test_an_adapter_that_changes_nothing_is_refused(
    tiny_model_dir: Path, tmp_path: Path, method: Method, quantization: str
) -> None:
    n = replace(NUMERICS, quantization=Quantization(quantization))
    untrained = Lora(4, 4.0, 0.0, ["k_proj", "down_proj"], method=method)
    adapters.save(adapters.add_adapter(models.load_base(tiny_model_dir, n), untrained), tmp_path)
    with pytest.raises(ModelError, match="update of every weight is zero"):
        merging.merge(tiny_model_dir, tmp_path, MERGE, n)


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The adapter with other weights."""
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


B = f"base_model.model.{PROJECTION}.lora_B.weight"


def test_an_update_that_the_saved_type_cannot_hold_is_refused(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    tiny = changed(adapter, tmp_path, lambda weights: [w.mul_(1e-15) for k, w in weights.items() if "lora_B" in k])
    with pytest.raises(ModelError, match=r"lost in bfloat16.*merge\.dtype=float32"):
        merging.merge(tiny_model_dir, tiny, replace(MERGE, base=Base.original, dtype=Dtype.bfloat16), NUMERICS)


def test_an_adapter_with_nan_is_refused(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    broken = changed(adapter, tmp_path, lambda weights: weights[B].view(-1)[0].fill_(float("nan")))
    with pytest.raises(ModelError, match="NaN"):
        merging.merge(tiny_model_dir, broken, MERGE, NUMERICS)


def test_a_torn_adapter_is_refused(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    torn = changed(adapter, tmp_path, lambda weights: None) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: no readable safetensors.*qlora_train"):
        merging.merge(tiny_model_dir, tmp_path, MERGE, NUMERICS)


def test_an_adapter_of_another_base_is_refused(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = changed(adapter, tmp_path, lambda weights: weights.update({B: torch.ones(300, 4)}))
    with pytest.raises(ModelError, match=r"(?s)does not fit models/base.*size mismatch"):
        merging.merge(tiny_model_dir, foreign, MERGE, NUMERICS)


def test_a_weight_too_large_for_float16_is_refused(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    large = changed(adapter, tmp_path, lambda weights: weights[B].mul_(1e7))
    with pytest.raises(ModelError, match=rf"{PROJECTION}\.weight: does not fit into float16.*merge\.dtype"):
        merging.merge(tiny_model_dir, large, replace(MERGE, dtype=Dtype.float16), NUMERICS)


@pytest.mark.parametrize("quantization", [Quantization.nf4, Quantization.fp4, Quantization.int8, Quantization.none])
def test_one_weight_through_quantization_is_what_the_loaded_base_multiplies_with(
    tiny_model_dir: Path, quantization: Quantization
) -> None:
    n = replace(NUMERICS, quantization=quantization, double_quantization=quantization is Quantization.nf4)
    through, stored = Requantized(tiny_model_dir, n), load_file(tiny_model_dir / "model.safetensors")
    loaded = models.load_base(tiny_model_dir, n, dense=True)
    if quantization is Quantization.int8:
        loaded = loaded.dequantize(torch.float32)
    assert len(through.names) == (0 if quantization is Quantization.none else 14)
    for name in through.names:
        assert torch.equal(through.values(name, stored[f"{name}.weight"]), loaded.get_submodule(name).weight)


def test_merging_in_the_pages_of_the_bases_files_leaves_the_files_as_they_are(
    tiny_model_dir: Path, adapter: Path
) -> None:
    before = files.sha256(tiny_model_dir / "model.safetensors")
    merging.merge(tiny_model_dir, adapter, replace(MERGE, dtype=Dtype.bfloat16), NUMERICS)
    assert files.sha256(tiny_model_dir / "model.safetensors") == before


def another(base: Path, folder: Path, *, weight: float = 1.0, seed: int = 2, **recipe: Any) -> dict[str, Any]:
    """An entry of merge.adapters, for an adapter of its own: rank 4, scaling 2, B random."""
    p = Lora(4, 8.0, 0.0, ["q_proj", "down_proj"], **recipe)
    torch.manual_seed(seed)
    model = adapters.add_adapter(models.load_base(base, NUMERICS), p)
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapters.save(model, folder)
    return {"path": str(folder), "sha256": others.sha256(folder), "weight": weight}


def update(adapter: Path, scaling: float) -> torch.Tensor:
    stem, stored = f"base_model.model.{PROJECTION}", load_file(adapter / "adapter_model.safetensors")
    return scaling * stored[f"{stem}.lora_B.weight"] @ stored[f"{stem}.lora_A.weight"]


@pytest.mark.parametrize("alpha_mode", [AlphaMode.fixed, AlphaMode.rslora])
def test_several_adapters_merge_as_the_weighted_sum_of_their_updates(
    tiny_model_dir: Path, tmp_path: Path, alpha_mode: AlphaMode
) -> None:
    own, entry = tmp_path / "own", another(tiny_model_dir, tmp_path / "other", weight=-0.75)
    another(tiny_model_dir, own, alpha_mode=alpha_mode, seed=3)
    p = replace(MERGE, base=Base.original, adapters={"other": entry}, weight=0.25)
    scaling = 4.0 if alpha_mode is AlphaMode.rslora else 2.0
    base = load_file(tiny_model_dir / "model.safetensors")[f"{PROJECTION}.weight"].float()
    expected = base + 0.25 * update(own, scaling) - 0.75 * update(tmp_path / "other", 2.0)
    merged = merging.merge(tiny_model_dir, own, p, NUMERICS)
    torch.testing.assert_close(merged.get_submodule(PROJECTION).weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "combination",
    [pytest.param(each, marks=() if each is Combination.dare_ties else pytest.mark.slow) for each in Combination],
)
def test_every_combination_is_the_model_it_is_measured_against_and_the_same_again(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path, combination: Combination
) -> None:
    entry = another(tiny_model_dir, tmp_path / "other")
    p = replace(MERGE, combination=combination, adapters={"other": entry})
    tuned = merging.trained(tiny_model_dir, adapter, p, NUMERICS)
    merged = [merging.merge(tiny_model_dir, adapter, p, NUMERICS) for _ in range(2)]
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        torch.testing.assert_close(merged[0](input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged[1](input_ids=ids).logits, merged[0](input_ids=ids).logits, rtol=0, atol=0)


def test_what_dare_drops_follows_the_seed(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    entry = another(tiny_model_dir, tmp_path / "other")
    p = replace(MERGE, combination=Combination.dare_linear, adapters={"other": entry})
    weights = [
        merging.merge(tiny_model_dir, adapter, replace(p, seed=seed), NUMERICS).get_submodule(PROJECTION).weight
        for seed in (1, 2)
    ]
    assert not torch.equal(*weights)


def test_adapters_that_cannot_be_combined_are_refused_before_a_model_is_loaded(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    entry = another(tiny_model_dir, tmp_path / "other")

    def refused(entry: dict[str, Any], message: str, fault: type[Exception] = ConfigError, **more: Any) -> None:
        with pytest.raises(fault, match=message):
            merging.check(adapter, replace(MERGE, adapters={"other": entry}, **more))

    refused(
        entry | {"sha256": None}, r"merge\.adapters\.other\.sha256: found None.*have " + entry["sha256"], ModelError
    )
    refused(entry | {"path": "/nowhere"}, r"merge\.adapters\.other\.path: found '/nowhere'", ModelError)
    refused({"path": "x"}, r"merge\.adapters: found \['other'\], expected .*weight")
    dora = another(tiny_model_dir, tmp_path / "dora", method=Method.dora)
    refused(dora, r"(?s)merge\.adapters: .*other is lora\+use_dora.*expected plain LoRA")
    pissa = another(tiny_model_dir, tmp_path / "pissa", method=Method.pissa)
    refused(pissa, r"(?s)ranks are .*'other': 8.*combination=ties; cat takes any", combination=Combination.ties)


def test_an_adapter_of_another_base_is_not_combined(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    entry = another(tiny_model_dir, tmp_path / "other")
    foreign = changed(tmp_path / "other", tmp_path / "other", lambda weights: weights.update({B: torch.ones(300, 4)}))
    entry["sha256"] = others.sha256(foreign)
    with pytest.raises(ModelError, match=r"(?s)other: does not fit models/base.*size mismatch.*merge\.adapters"):
        merging.trained(tiny_model_dir, adapter, replace(MERGE, adapters={"other": entry}), NUMERICS)


@pytest.mark.slow
def test_a_merge_takes_at_most_1_3_times_the_16_bit_size_in_memory(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    throwaway_tokenizer().save_pretrained(base)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    make_adapter(base, adapter)
    done = run(ROOT, sys.executable, "-c", MEASURED_MERGE, str(base), str(adapter), str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert size > 700e6
    assert int(done.stdout) < 1.3 * size


MEASURED_MERGE = """
import re, sys
from dataclasses import replace
from pathlib import Path

def memory(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

from stages.lib import merging
from stages.lib.schema.merge import Base, Combination, Dtype
from tests.conftest import ROOT, run, throwaway_tokenizer
from tests.exported import MERGE, NUMERICS

before = memory("VmRSS")
base, adapter, merged = map(Path, sys.argv[1:])
p = replace(MERGE, dtype=Dtype.float16)
merging.save(merging.merge(base, adapter, p, NUMERICS), base, merged)
print(memory("VmHWM") - before)
"""
