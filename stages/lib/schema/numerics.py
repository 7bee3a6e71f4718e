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
    """How the frozen base is held."""

    nf4 = "nf4"  # QLoRA, arXiv:2305.14314
    fp4 = "fp4"
    int8 = "int8"  # LLM.int8, arXiv:2208.07339: rounds activations, too
    none = "none"  # at the compute type: plain LoRA, and the only one whose weights can be trained


class Storage(StrEnum):
    """The type of tensor in which packed 4-bit weights lie; their values are the same in each."""

    uint8 = "uint8"
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass
class Numerics:
    determinism: Determinism
    compute_dtype: ComputeDtype
    adapter_dtype: ComputeDtype
    device: Device
    quantization: Quantization
    double_quantization: bool  # of the scales of nf4 and fp4
    quantized_storage: Storage = Storage.uint8  # of nf4 and fp4; train.sharding=fsdp needs the compute type
