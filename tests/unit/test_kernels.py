"""Fast layers, norms and attention: PEFT's, transformers' and SDPA's functions; documents of a pack are apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stages.lib import adapters, kernels, loss, models
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
}
QUICK = {"_LoraProductsBackward", "_RmsNormBackward", "_GatedSiluBackward"}
"""Steps of this module's; of Gemma 3 only the adapters': its norms and its activation are others."""


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Callable[[], Any]:
    return lambda: models.load_base(tiny_model_dir, NF4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_quantized", [True, False])
def test_the_fused_layer_is_pefts_layer(dropout: float, bias: bool, is_quantized: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, bias=bias).requires_grad_(False)
    base: Any = plain
    if is_quantized:
        base = bitsandbytes.nn.Linear4bit(128, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        base.load_state_dict(plain.state_dict())
        base = base.to("cpu").requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    x = torch.randn(2, 9, 128)
    found = []
    for layer_class in (Linear4bit, kernels.FusedLora) if is_quantized else (Linear, kernels.FusedLinear):
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


@pytest.mark.parametrize(
    ("decoder", "is_checkpointing", "dropout"),
    [(decoder, False, 0.0) for decoder in DECODERS] + [("llama", True, 0.0), ("llama", False, 0.2)],
)
def test_a_quickened_model_has_the_loss_and_gradients_of_its_documents_alone(
    decoder: str, is_checkpointing: bool, dropout: float
) -> None:
    """Against the same model as PEFT and transformers compute it, one document at a time."""
    torch.manual_seed(0)
    base = DECODERS[decoder]()
    for name, weight in base.named_parameters():
        if "norm" in name:
            weight.data.normal_(1, 0.5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    plain = get_peft_model(base, config)
    for weight in adapters.trainable(plain).values():
        weight.data.normal_(std=0.1)
    state = {name: weight.detach().clone() for name, weight in plain.state_dict().items()}
    documents = [torch.randint(0, 96, (n,)) for n in (3, 9, 6)]

    reference = 0.0
    plain.train(not dropout)  # without dropout where it would be drawn otherwise
    for ids in documents:
        reference = reference + torch.nn.functional.cross_entropy(
            plain(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="sum"
        )
    reference.backward()
    wanted = {name: weight.grad for name, weight in adapters.trainable(plain).items()}

    torch.manual_seed(0)
    config._register_custom_module({torch.nn.Linear: kernels.FusedLinear})
    quick = get_peft_model(DECODERS[decoder](), config)
    assert quick.load_state_dict(state) is not None
    quick.base_model.model.set_attn_implementation(kernels.DOCUMENTS)
    if is_checkpointing:
        quick.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    kernels.quicken(quick)
    assert list(quick.state_dict()) == list(state)
    batch = loss.end_to_end(
        [
            {"input_ids": ids.tolist(), "labels": [-100, *ids[1:].tolist()], "position_ids": list(range(len(ids)))}
            for ids in documents
        ]
    )
    nll, n = loss.answer_nll(quick.train(not dropout), batch)
    expected = {"_LoraProductsBackward"} if decoder == "gemma3" else QUICK
    assert is_checkpointing or QUICK & steps_of(nll) == expected
    nll.backward()
    assert n == 15
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=1e-5)
    for name, weight in adapters.trainable(quick).items():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def steps_of(result: torch.Tensor) -> set[str]:
    """Names of the autograd steps that led to a tensor."""
    found: set[Any] = set()
    open_ends: list[Any] = [result.grad_fn]
    while open_ends:
        step = open_ends.pop()
        if step is not None and step not in found:
            found.add(step)
            open_ends += [before for before, _ in step.next_functions]
    return {step.name() for step in found}


def test_what_is_computed_otherwise_is_left_alone() -> None:
    """Gemma's norm is (1 + w) x / rms(x), its attention caps scores; Qwen3's attention has norms of its own."""
    for base, kinds in (
        (Gemma2ForCausalLM(Gemma2Config(**SMALL)), set()),
        (DECODERS["qwen3"](), {"QuickQwen3RMSNorm", "QuickQwen3MLP"}),
        (DECODERS["llama"](), {"QuickLlamaRMSNorm", "QuickLlamaMLP", "QuickLlamaAttention"}),
    ):
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        kernels.quicken(model)
        assert {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Quick")} - {
            "QuickGemma2MLP"  # of the same code; its activation is not SiLU, which it asks
        } == kinds


@pytest.mark.parametrize("method", [{"use_dora": True}, {"lora_bias": True}])
def test_other_methods_are_computed_by_peft(method: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **method)
    base = DECODERS["llama"]()
    ids = torch.arange(12)[None]
    plain = get_peft_model(base, config)
    for weight in adapters.trainable(plain).values():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    config._register_custom_module({torch.nn.Linear: kernels.FusedLinear})
    quick = get_peft_model(DECODERS["llama"](), config)
    quick.load_state_dict(plain.state_dict())
    kernels.quicken(quick)
    torch.testing.assert_close(quick(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_layers_that_drop_inputs_draw_a_mask_each() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    config._register_custom_module({torch.nn.Linear: kernels.FusedLinear})
    mlp = get_peft_model(DECODERS["llama"](), config).train().base_model.model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(1, 5, 64)
    torch.manual_seed(1)
    together = kernels.products(x, (mlp.gate_proj, mlp.up_proj))
    torch.manual_seed(1)
    torch.testing.assert_close(together, (mlp.gate_proj(x), mlp.up_proj(x)))


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


def test_a_layer_that_caps_its_scores_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"knows no \['softcap'\] of Module"):
        kernels.document_attention(torch.nn.Module(), q, q, q, None, document_lengths=[4], softcap=30.0)
