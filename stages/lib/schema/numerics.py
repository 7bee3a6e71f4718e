"""conf/numerics: everything about arithmetic that can change a result; tracked by every stage that computes."""

from dataclasses import dataclass
from enum import StrEnum


class Determinism(StrEnum):
    strict = "strict"  # one code path of the matrix library, whatever threads and load
    loose = "loose"  # the matrix library chooses; a repeat may differ in the last bits


class ComputeDtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Quantization(StrEnum):
    nf4 = "nf4"
    none = "none"


@dataclass
class Numerics:
    determinism: Determinism
    compute_dtype: ComputeDtype
    adapter_dtype: ComputeDtype
    device: Device
    quantization: Quantization  # how the frozen base is held: nf4 is QLoRA, none is LoRA
    double_quantization: bool
