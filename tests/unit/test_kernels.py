"""Fast layers and attention: PEFT's and SDPA's functions, and packed documents do not see each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit

from stages.lib import adapters, kernels, models
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Callable[[], Any]:
    return lambda: models.load_base(tiny_model_dir, NF4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_layer_is_pefts_layer(dropout: float, bias: bool) -> None:
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(128, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(torch.nn.Linear(128, 64, bias=bias).state_dict())
    base = base.to("cpu")
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    x = torch.randn(2, 9, 128)
    found = []
    for layer_class in (Linear4bit, kernels.FusedLora):
        torch.manual_seed(1)
        layer = layer_class(base, "default", config=config, r=4, lora_alpha=8)
        layer.lora_B["default"].weight.data.normal_()
        given = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = layer(given)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found.append((y, given.grad, a.grad, b.grad))
    for peft, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, peft, rtol=1e-4, atol=1e-4)


def test_the_adapter_is_trained_through_the_fused_layer_only(load: Callable[[], Any]) -> None:
    model = adapters.add_adapter(load(), Lora(4, 4.0, 0.0, "all-linear"))
    assert sum(isinstance(layer, kernels.FusedLora) for layer in model.modules()) == 14
    assert all("lora_" in name for name in adapters.trainable(model))


@pytest.mark.parametrize("is_training", [True, False])
def test_packed_documents_are_computed_as_if_alone(load: Callable[[], Any], is_training: bool) -> None:
    model = adapters.add_adapter(load(), Lora(4, 4.0, 0.0, "all-linear")).train(is_training)
    documents = [torch.arange(5, 25), torch.arange(30, 37), torch.arange(40, 90)]
    lengths = [len(document) for document in documents]
    packed = model(
        input_ids=torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        document_lengths=lengths,
        use_cache=False,
    ).logits[0]
    alone = [model(input_ids=document[None], use_cache=False).logits[0] for document in documents]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    together = model(input_ids=torch.cat(documents)[None], use_cache=False).logits[0]
    assert (together - packed).abs().max() > 1e-2  # so that the comparison above could have failed


def test_a_sliding_window_is_kept_inside_a_document() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    narrow, _ = kernels.document_attention(torch.nn.Module(), q, k, v, None, document_lengths=[12], sliding_window=3)
    last, _ = kernels.document_attention(
        torch.nn.Module(), q[:, :, -3:], k[:, :, -3:], v[:, :, -3:], None, document_lengths=[3]
    )
    torch.testing.assert_close(narrow[:, -1], last[:, -1])
    wide, _ = kernels.document_attention(torch.nn.Module(), q, k, v, None, document_lengths=[12])
    assert not torch.allclose(narrow[:, -1], wide[:, -1])


def test_padded_batches_are_still_masked(load: Callable[[], Any]) -> None:
    model = adapters.add_adapter(load(), Lora(4, 4.0, 0.0, "all-linear")).eval()
    short, long = torch.arange(5, 12), torch.arange(20, 40)
    ids = torch.stack([torch.cat([torch.zeros(13, dtype=torch.long), short]), long])
    mask = torch.stack([torch.tensor([0] * 13 + [1] * 7), torch.ones(20, dtype=torch.long)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(both[0, 13:], model(input_ids=short[None]).logits[0], rtol=1e-4, atol=1e-4)
