"""Training in several processes: what is refused before a start, how cores are shared, what a failure is called."""

import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.lib import launching, models, unpacking
from stages.lib.errors import ConfigError, DataError, ExternalError
from stages.lib.schema.lora import Lora, Method
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization, Storage
from stages.lib.schema.runtime import Launcher, check_launcher
from stages.lib.schema.train import Optimizer, Sharding, check_processes
from tests import tiny_training

TRAIN = replace(tiny_training.TRAIN, processes=2, sharding=Sharding.fsdp)
LORA = Lora(4, 8.0, 0.0, "all-linear")
BFLOAT16 = Numerics(
    Determinism.strict,
    ComputeDtype.bfloat16,
    ComputeDtype.bfloat16,
    Device.cuda,
    Quantization.nf4,
    True,
    Storage.bfloat16,
)


def test_the_local_launcher_refuses_several_processes() -> None:
    check_launcher(Launcher.local, 1)
    check_launcher(Launcher.torchrun, 2)
    with pytest.raises(ConfigError, match=r"runtime\.launcher: found local with train\.processes=2, expected torchrun"):
        check_launcher(Launcher.local, 2)


def test_a_group_of_another_size_than_configured_is_no_training(tiny_model_dir: Path) -> None:
    tokenizer = models.load_tokenizer(tiny_model_dir)
    with pytest.raises(ExternalError, match=r"train\.processes: found 1 that know each other, expected 2"):
        tiny_training.fit(tiny_model_dir, tokenizer, replace(tiny_training.TRAIN, processes=2))


def test_fsdp_of_one_type_in_all_is_accepted() -> None:
    check_processes(TRAIN, LORA, BFLOAT16, "cuda")
    dense = replace(BFLOAT16, quantization=Quantization.none, quantized_storage=Storage.uint8)
    check_processes(TRAIN, LORA, dense, "cuda")


@pytest.mark.parametrize(
    ("changes", "device", "said"),
    [
        (
            {"quantized_storage": Storage.uint8},
            "cuda",
            r"numerics\.quantized_storage: found 'uint8', expected bf",
        ),
        ({"adapter_dtype": ComputeDtype.auto}, "cuda", r"numerics\.adapter_dtype: found 'auto', expected bfloat16"),
        ({"compute_dtype": ComputeDtype.auto}, "cuda", r"numerics\.compute_dtype: found 'auto', expected bfloat16 or"),
        ({"quantization": Quantization.int8}, "cuda", r"numerics\.quantization: found 'int8'"),
        ({}, "cpu", r"numerics\.device: found 'cpu', expected cuda"),
        ({"processes": 1}, "cuda", r"train\.processes: found 1, expected at least 2"),
        ({"optimizer": Optimizer.paged_adamw_8bit}, "cuda", r"train\.optimizer: found 'paged_adamw_8bit'"),
        ({"method": Method.dora}, "cuda", r"lora\.method: found 'dora'"),
        ({"method": Method.prompt_tuning, "sharding": Sharding.none}, "cuda", r"lora\.method: .*virtual tokens"),
    ],
)
def test_what_several_processes_or_shares_cannot_do_is_refused(changes: Any, device: str, said: str) -> None:
    train, lora, numerics = (
        replace(section, **{name: value for name, value in changes.items() if hasattr(section, name)})
        for section in (TRAIN, LORA, BFLOAT16)
    )
    with pytest.raises(ConfigError, match=said):
        check_processes(train, lora, numerics, device)


def test_packed_weights_stand_for_the_same_values_in_every_storage(tiny_model_dir: Path) -> None:
    found = []
    for storage in Storage:
        model = models.load_base(tiny_model_dir, replace(tiny_training.NF4, quantized_storage=storage))
        layer: Any = model.model.layers[0].mlp.up_proj
        assert str(layer.weight.dtype) == f"torch.{storage}"
        found.append(unpacking.dequantized(layer, model.dtype))
    assert all((values == found[0]).all() for values in found)


def test_what_a_process_raised_is_raised_here_and_the_others_fail_of_it(tmp_path: Path) -> None:
    (tmp_path / "fault-1").write_bytes(pickle.dumps(DataError("no rows")))
    assert str(launching._fault(tmp_path, {0: 1, 1: 2})) == "no rows"


def test_a_signal_from_outside_is_named_before_what_it_made_of_the_others(tmp_path: Path) -> None:
    fault = launching._fault(tmp_path, {0: 1, 1: -signal.SIGKILL, 2: -signal.SIGTERM})
    assert str(fault).startswith("process 1 of train.processes ended by signal SIGKILL")


def test_a_worker_of_ray_tells_how_its_experiment_goes_where_a_search_listens() -> None:
    launching_ray = pytest.importorskip("stages.lib.launching_ray")
    assert {"DVC_EXP_NAME", "PIPELINE_ROOT"} <= set(launching_ray.HANDED_ON)
