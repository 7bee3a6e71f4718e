"""Models as they are loaded: NF4 the same everywhere, gradients right after an evaluation, adapters complete."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.lib import adapters, models, numerics, unpacking
from stages.lib.errors import ModelError
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)
PLAIN = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.none, True)
IDS = torch.arange(3, 40)[None]


def test_unpacked_weights_give_the_same_bits_and_are_let_go(adapter: Path, tiny_model_dir: Path) -> None:
    model = models.load_tuned(tiny_model_dir, adapter, NF4)
    before = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    with unpacking.unpacked(model, torch.float32):
        assert unpacking.dequantized(layer, torch.float32) is unpacking.dequantized(layer, torch.float32)
        assert torch.equal(logits(model), before)
    assert unpacking.dequantized(layer, torch.float32) is not unpacking.dequantized(layer, torch.float32)


def test_vector_functions_are_set_up_before_weights_are_read(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    read = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(numerics, "start_vector_math", lambda: calls.append("vector math"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: calls.append("read") or read(*a, **k))
    models.load_base(tiny_model_dir, NF4)
    assert calls == ["vector math", "read"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter that does something: B drawn at random instead of zero."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    torch.manual_seed(0)
    model = adapters.add_adapter(models.load_base(tiny_model_dir, NF4), Lora(4, 8.0, 0.0, "all-linear"))
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapters.save(model, folder)
    return folder


def test_the_base_is_nf4_with_its_scales_quantized_again(tiny_model_dir: Path) -> None:
    model = models.load_base(tiny_model_dir, NF4)
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert not torch.equal(logits(model), logits(models.load_base(tiny_model_dir, PLAIN)))


def test_the_dense_base_is_the_nf4_base_to_the_bit(tiny_model_dir: Path) -> None:
    dense = models.load_base(tiny_model_dir, NF4, dense=True)
    assert not any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in dense.modules())
    assert torch.equal(logits(dense), logits(models.load_base(tiny_model_dir, NF4)))


@pytest.mark.parametrize("quantization", [Quantization.nf4, Quantization.fp4, Quantization.int8])
def test_an_evaluation_does_not_change_later_gradients(tiny_model_dir: Path, quantization: Quantization) -> None:
    """PEFT's own layers. Red without the guard on CPUs with AVX512_BF16; on others there is nothing to guard."""
    torch.manual_seed(0)
    base = models.load_base(tiny_model_dir, replace(NF4, quantization=quantization))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    logits(model.eval())
    after = gradients()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_no_layer_may_repack_itself_for_evaluation(tiny_model_dir: Path) -> None:
    """The cause of wrong gradients, seen on every CPU; without the guard, those with AVX512_BF16 show the effect."""
    model = models.load_base(tiny_model_dir, NF4)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert flags == [False] * 14


@pytest.mark.parametrize("dense", [False, True])
def test_the_tuned_model_is_the_base_when_its_adapter_is_off(tiny_model_dir: Path, adapter: Path, dense: bool) -> None:
    model = models.load_tuned(tiny_model_dir, adapter, NF4, dense=dense)
    base = logits(models.load_base(tiny_model_dir, NF4))
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_the_tuned_model_is_the_same_dense_and_packed(tiny_model_dir: Path, adapter: Path) -> None:
    packed, dense = (logits(models.load_tuned(tiny_model_dir, adapter, NF4, dense=dense)) for dense in (False, True))
    assert torch.equal(packed, dense)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_an_incomplete_adapter_is_not_loaded(tiny_model_dir: Path, adapter: Path, tmp_path: Path, change: str) -> None:
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    else:
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors? {change}|1 {change}"):
        models.load_tuned(tiny_model_dir, broken, NF4)


def test_a_folder_of_pickled_weights_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        models.load_base(folder, NF4)


def test_a_folder_that_asks_for_remote_code_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        models.load_base(folder, NF4)


def test_a_missing_folder_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: not found.*base_model"):
        models.load_base(tmp_path, NF4)
    with pytest.raises(ModelError, match=r"no adapter found.*qlora_train"):
        models.load_tuned(tmp_path, tmp_path, NF4)


def test_a_saved_4_bit_folder_is_loaded_as_it_is_and_is_no_dense_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = models.load_base(tiny_model_dir, NF4)
    model.save_pretrained(tmp_path / "nf4")
    assert torch.equal(logits(models.load_base(tmp_path / "nf4", NF4)), logits(model))
    with pytest.raises(ModelError, match="weights are quantized"):
        models.load_dense(tmp_path / "nf4", NF4)
