"""Device and dtypes: what auto comes to, and what cannot be had."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from stages.lib import numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

AUTO = Numerics(Determinism.strict, ComputeDtype.auto, ComputeDtype.auto, Device.auto, Quantization.nf4, True)


@pytest.mark.parametrize(
    ("has_gpu", "has_bfloat16", "expected"),
    [
        (False, False, ("cpu", "float32", "float32")),
        (True, True, ("cuda", "bfloat16", "float32")),
        (True, False, ("cuda", "float32", "float32")),
    ],
)
def test_auto_follows_the_machine(
    has_gpu: bool, has_bfloat16: bool, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    found = numerics.resolve(AUTO)
    assert (found.device, found.compute_dtype, found.adapter_dtype) == expected


def test_a_configured_gpu_that_is_not_there_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"numerics.device: found cuda, .* no GPU.* auto or cpu"):
        numerics.resolve(dataclasses.replace(AUTO, device=Device.cuda))


@pytest.mark.parametrize(
    ("determinism", "device", "expected"),
    [
        (Determinism.strict, Device.cpu, "bit-equal"),
        (Determinism.strict, Device.cuda, "deterministic kernels"),
        (Determinism.loose, Device.cpu, "not enforced"),
    ],
)
def test_what_a_repeat_gives_is_said(
    determinism: Determinism, device: Device, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = numerics.resolve(dataclasses.replace(AUTO, determinism=determinism, device=device))
    assert found.determinism == expected
    assert expected in found.reason


@pytest.mark.parametrize(("determinism", "is_strict"), [(Determinism.strict, True), (Determinism.loose, False)])
def test_the_matrix_library_is_held_to_one_code_path_where_determinism_is_strict(
    determinism: Determinism, is_strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(numerics, "sys", SimpleNamespace(modules={}))
    found = numerics.settle(dataclasses.replace(AUTO, determinism=determinism), 3)
    assert found.get("MKL_CBWR", "").endswith(",STRICT") is is_strict
    assert (found["OMP_NUM_THREADS"], found["MKL_DYNAMIC"]) == ("3", "FALSE")
    assert numerics.os.environ == found
