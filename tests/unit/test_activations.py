"""Activations: torch's values, and the same bytes on any number of threads, also where these cut inside a vector."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import GELUTanh, SiLUActivation

from stages.lib import activations

SIZES = ((101, 1400), (151, 512), (333, 1400), (65, 1009))  # odd numbers of elements a thread
THREADS = (2, 3, 4, 6, 8, 12)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_threads(compute: Callable[[], torch.Tensor]) -> list[bool]:
    """For each number of threads whether the bytes are those of one thread."""
    torch.set_num_threads(1)
    alone = compute()
    found = []
    for n in THREADS:
        torch.set_num_threads(n)
        found.append(torch.equal(compute(), alone))
    return found


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SiLUActivation, GELUTanh])
def test_an_activation_is_that_of_torch_on_one_thread_and_equal_on_any_other_number(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    plain, steady = kind(), kind()
    activations.steady(steady)
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        torch.set_num_threads(1)
        assert torch.equal(steady(x), plain(x))
        assert torch.equal(gradient(steady, x), gradient(plain, x))
        assert all(on_threads(lambda x=x: steady(x))), size  # type: ignore[misc]
        assert all(on_threads(lambda x=x: gradient(steady, x))), size  # type: ignore[misc]


def test_the_kernels_of_torch_still_need_it() -> None:
    """Once this fails, torch has mended it and stages/lib/activations.py can go."""
    x = torch.randn(SIZES[0], generator=torch.Generator().manual_seed(0))
    assert not all(on_threads(lambda: functional.silu(x)))


def test_a_decoder_has_the_same_loss_and_gradients_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 400, "num_hidden_layers": 1, "vocab_size": 211}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=3, num_key_value_heads=1, **sizes))
    activations.steady(model)
    ids = torch.randint(0, 211, (1, 221))

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return torch.cat([loss.detach().view(1), *(p.grad.view(-1) for p in model.parameters() if p.grad is not None)])

    assert all(on_threads(step))
