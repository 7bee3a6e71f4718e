"""Arithmetic, decided in one place: library modes before torch is imported, device and dtypes after.

Same inputs give the same bytes only while the matrix library takes one code path whatever the number of threads and the
load of the machine: MKL's conditional numerical reproducibility with STRICT
(https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-0/obtaining-numerically-reproducible-results.html).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.lib import leases
from stages.lib.errors import ConfigError
from stages.lib.schema.numerics import Determinism, Device, Numerics


def settle(numerics: Numerics, threads: int | None) -> dict[str, str]:
    """Set what the arithmetic libraries read from the environment, once, when they are first loaded.

    Args: threads: of the arithmetic; None for this process's share of the cores, see leases.threads.
    Returns: the variables set, for the record of this run.
    """
    if "torch" in sys.modules:
        raise AssertionError("torch was imported before its numerics were settled; import it inside main()")
    cores = str(threads or leases.threads())
    variables = {
        "OMP_NUM_THREADS": cores,
        "MKL_NUM_THREADS": cores,
        "MKL_DYNAMIC": "FALSE",
        "TOKENIZERS_PARALLELISM": "false",
        # Nothing is compiled at run time: bitsandbytes would do so, but only where it finds a C++ compiler.
        "TORCHDYNAMO_DISABLE": "1",
        # GNU OpenMP's threads spin while they wait. Beside another process on the same cores that made a loop of small
        # and large products five times slower; with a short spin each gets its share, and alone it costs little.
        "GOMP_SPINCOUNT": "5000",
    }
    if numerics.determinism is Determinism.strict:
        variables |= {"MKL_CBWR": f"{_vector_extension()},STRICT", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.environ.update(variables)
    return variables


def _vector_extension() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return "AVX512" if cpuinfo.exists() and "avx512f" in cpuinfo.read_text() else "AVX2"


DETERMINISM = {
    (Determinism.strict, "cpu"): "bit-equal",
    (Determinism.strict, "cuda"): "deterministic kernels",  # where there are some; bitsandbytes' 4-bit ones are
    (Determinism.loose, "cpu"): "not enforced",
    (Determinism.loose, "cuda"): "not enforced",
}


@dataclass(frozen=True)
class Resolved:
    """What `auto` came to. Dtypes by their torch names, so that asking does not need torch."""

    device: str
    compute_dtype: str
    adapter_dtype: str
    determinism: str  # what a repeat gives: see DETERMINISM
    reason: str


def resolve(numerics: Numerics) -> Resolved:
    """Choose device and dtypes where the configuration says auto.

    CPU: float32 for both; bfloat16 without AMX is slower there. CUDA: bfloat16 compute where the card has it, float32
    adapters, since LoRA updates below bfloat16's 8 bits of precision would be lost.

    Raises: ConfigError, when a GPU is configured and torch sees none.
    """
    import torch

    device = str(numerics.device)
    if numerics.device is Device.auto:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"numerics.device: found cuda, but torch {torch.__version__} sees no GPU here. Expected auto or cpu, or a "
            "GPU and the environment that `make env` installs beside one."
        )
    return on(numerics, device, has_bfloat16=device == "cuda" and torch.cuda.is_bf16_supported())


def on(numerics: Numerics, device: str, *, has_bfloat16: bool) -> Resolved:
    """What `auto` comes to on a device, `cpu` or `cuda`, which need not be here."""
    compute, adapter = str(numerics.compute_dtype), str(numerics.adapter_dtype)
    reason = f"device={device} ({'found' if numerics.device is Device.auto else 'configured'})"
    if compute == "auto":
        compute = "bfloat16" if has_bfloat16 else "float32"
        reason += f", compute {compute} ({'the card has it' if has_bfloat16 else 'no bfloat16 matrix units used'})"
    if adapter == "auto":
        adapter = "float32"
        reason += ", adapters float32 (small updates survive)"
    determinism = DETERMINISM[numerics.determinism, device]
    return Resolved(device, compute, adapter, determinism, f"{reason}, a repeat is {determinism}")


def arithmetic() -> dict[str, str]:
    """What the last bits of a result depend on beside parameters, data and code: libraries' code paths and devices."""
    import torch

    settled = {
        name: os.environ.get(name, "") for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG")
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return settled | {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "gpu": gpu}


def start_vector_math() -> None:
    """Let MKL set its vector functions up on one thread, before any tensor is large enough for several.

    When two threads make the process's first call of one at the same time, one of them may get a less accurate variant
    for that call: seen once in some 3,000 starts, as rotary embeddings that were off by 1.5e-4.
    """
    import torch

    torch.cos(torch.zeros(1))


def seed_everything(seed: int, numerics: Numerics) -> None:
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels when determinism is strict."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(numerics.determinism is Determinism.strict, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid; it costs 3% of a training step
