"""conf/train: the optimisation."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import ConfigError, check_values
from stages.lib.schema.lora import VIRTUAL, Lora, Method
from stages.lib.schema.numerics import Numerics, Quantization


class Scheduler(StrEnum):
    """How the learning rate falls after the warm-up; all but constant have one."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"


class Optimizer(StrEnum):
    adamw_torch = "adamw_torch"
    adamw_torch_fused = "adamw_torch_fused"
    adamw_8bit = "adamw_8bit"  # from here on bitsandbytes', on a GPU only
    paged_adamw_8bit = "paged_adamw_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"


class Sharding(StrEnum):
    """What each of train.processes holds of the model."""

    none = "none"  # all of it: distributed data parallel
    fsdp = "fsdp"  # its share, and one layer at a time whole: for models beyond one GPU, arXiv:2304.11277


ON_GPU_ONLY = (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit, Optimizer.paged_adamw_32bit)


@dataclass
class Train:
    learning_rate: float
    epochs: float
    batch_size: int  # packs per forward pass
    gradient_accumulation_steps: int
    optimizer: Optimizer
    scheduler: Scheduler
    warmup_ratio: float  # share of all steps in which the learning rate rises
    weight_decay: float
    max_grad_norm: float  # gradients are scaled down to this norm; 0: never
    neftune_alpha: float  # noise on the embeddings while training (arXiv:2310.05914); 0: none
    gradient_checkpointing: bool
    evals_per_epoch: int
    eval_steps: int | None  # evaluate each so many optimizer steps instead of evals_per_epoch
    early_stopping_patience: int  # evaluations in a row without a lower validation loss; 0: never stop early
    early_stopping_threshold: float  # nats per token by which it has to be lower
    samples: int  # validation prompts answered at each evaluation, for the eye
    sample_tokens: int  # longest answer among those
    processes: int = 1  # each with batches of its own; packs of a step: processes x batch_size x accumulation
    sharding: Sharding = Sharding.none

    def __post_init__(self) -> None:
        check_values(
            ("train.learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            ("train.epochs", self.epochs, self.epochs > 0, "above 0"),
            ("train.batch_size", self.batch_size, self.batch_size > 0, "a positive number of packs"),
            (
                "train.gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                self.gradient_accumulation_steps > 0,
                "a positive number of batches",
            ),
            ("train.warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio < 1, "at least 0, below 1"),
            (
                "train.warmup_ratio",
                self.warmup_ratio,
                self.scheduler is not Scheduler.constant or self.warmup_ratio == 0,
                "0 with train.scheduler=constant; constant_with_warmup is the one that warms up",
            ),
            ("train.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("train.max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "above 0, or 0 not to clip"),
            ("train.neftune_alpha", self.neftune_alpha, self.neftune_alpha >= 0, "above 0, or 0 for no noise"),
            ("train.evals_per_epoch", self.evals_per_epoch, self.evals_per_epoch > 0, "at least 1"),
            (
                "train.eval_steps",
                self.eval_steps,
                self.eval_steps is None or self.eval_steps > 0,
                "at least 1, or null for evals_per_epoch",
            ),
            (
                "train.early_stopping_patience",
                self.early_stopping_patience,
                self.early_stopping_patience >= 0,
                "at least 1, or 0 to train to the end",
            ),
            (
                "train.early_stopping_threshold",
                self.early_stopping_threshold,
                self.early_stopping_threshold >= 0,
                "at least 0, in nats per token",
            ),
            ("train.samples", self.samples, self.samples >= 0, "at least 0"),
            ("train.sample_tokens", self.sample_tokens, self.sample_tokens > 0, "at least 1"),
            ("train.processes", self.processes, self.processes > 0, "at least 1"),
        )


def check_optimizer(p: Train, device: str) -> None:
    """Raise ConfigError when the optimizer does not exist on the device; with `auto` that is not known yet."""
    if p.optimizer in ON_GPU_ONLY and device == "cpu":
        raise ConfigError(
            f"train.optimizer: found {p.optimizer} with numerics.device={device}, expected adamw_torch or "
            "adamw_torch_fused there: bitsandbytes' optimizers need a GPU (numerics.device=cuda)."
        )


def check_processes(p: Train, lora: Lora, n: Numerics, device: str) -> None:
    """What several processes, and sharing a model between them, ask of other sections.

    FSDP lays the tensors of a block end to end, so that all have to be of one type: packed weights, what is not
    quantized, and the adapter (https://huggingface.co/docs/peft/accelerate/fsdp).

    Args: device: numerics.device, or what it came to; with `auto` it is not known yet.
    Raises: ConfigError, one line for each claim that does not hold.
    """
    if p.processes > 1:
        check_values(
            (
                "lora.method",
                str(lora.method),
                lora.method not in VIRTUAL,
                f"a method of layers with train.processes={p.processes}: virtual tokens are read document by document, "
                "and gradients are exchanged once a batch",
            ),
        )
    if p.sharding is not Sharding.fsdp:
        return
    compute, is_packed = str(n.compute_dtype), n.quantization in (Quantization.nf4, Quantization.fp4)
    why = "with train.sharding=fsdp, which lays weights and adapter out in tensors of one type"
    check_values(
        ("train.processes", p.processes, p.processes > 1, "at least 2 with train.sharding=fsdp, to share the model"),
        ("numerics.device", device, device != "cpu", "cuda with train.sharding=fsdp, which is for models beyond a GPU"),
        (
            "numerics.quantization",
            str(n.quantization),
            n.quantization is not Quantization.int8,
            "nf4, fp4 or none with train.sharding=fsdp: 8-bit layers cannot be shared",
        ),
        ("numerics.compute_dtype", compute, compute != "auto", f"bfloat16 or float32 {why}"),
        ("numerics.adapter_dtype", str(n.adapter_dtype), str(n.adapter_dtype) == compute, f"{compute} {why}"),
        (
            "numerics.quantized_storage",
            str(n.quantized_storage),
            not is_packed or str(n.quantized_storage) == compute,
            f"{compute} {why}",
        ),
        (
            "lora.method",
            str(lora.method),
            lora.method is Method.lora and not lora.modules_to_save,
            "lora without modules_to_save with train.sharding=fsdp",
        ),
        (
            "train.optimizer",
            str(p.optimizer),
            p.optimizer not in ON_GPU_ONLY,
            "adamw_torch or adamw_torch_fused with train.sharding=fsdp: bitsandbytes' optimizers know no shares",
        ),
    )
