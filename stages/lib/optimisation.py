"""conf/train in the words of TRL: optimizer, schedule, accumulation, noise, and when to evaluate."""

import math
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from trl import SFTConfig

from stages.lib import numerics
from stages.lib.schema.train import Sharding, Train


def arguments(p: Train, resolved: numerics.Resolved, *, seed: int, output_dir: str) -> SFTConfig:
    """What TRL's trainer is told."""
    return SFTConfig(
        output_dir=output_dir,
        seed=seed,
        data_seed=seed,
        learning_rate=p.learning_rate,
        num_train_epochs=p.epochs,
        per_device_train_batch_size=p.batch_size,
        per_device_eval_batch_size=p.batch_size,
        gradient_accumulation_steps=p.gradient_accumulation_steps,
        optim=p.optimizer.value,
        lr_scheduler_type=p.scheduler.value,
        warmup_steps=p.warmup_ratio,
        weight_decay=p.weight_decay,
        max_grad_norm=p.max_grad_norm,
        neftune_noise_alpha=p.neftune_alpha or None,
        gradient_checkpointing=p.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=resolved.device == "cuda" and resolved.compute_dtype == "bfloat16",
        use_cpu=resolved.device == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        ddp_find_unused_parameters=False,  # every tensor of the adapter takes part in every pass
        fsdp=True if p.sharding is Sharding.fsdp else None,
        fsdp_config={"version": 2} if p.sharding is Sharding.fsdp else None,
        report_to="none",
        disable_tqdm=True,
    )


def evaluations(p: Train, n_steps: int) -> list[int]:
    """The optimizer steps after which to evaluate, in order; the last of n_steps is always one of them."""
    if p.eval_steps:
        return sorted({*range(p.eval_steps, n_steps, p.eval_steps), n_steps})
    n = min(max(1, round(p.evals_per_epoch * p.epochs)), n_steps)
    return [round(n_steps * (i + 1) / n) for i in range(n)]


def scale_noise(model: PreTrainedModel, alpha: float) -> RemovableHandle:
    """Let NEFTune's noise be as strong as if documents were not packed.

    The hook of transformers draws from +-alpha / sqrt(T D) for a sequence of T tokens of width D. Packs laid end to end
    make one sequence of n documents, whose noise would be the weaker the more of them a forward pass holds. Each
    forward pass gets alpha sqrt(n), so that T counts as the mean length of its documents, whatever the batch size.

    Args: model: called with position_ids, which are 0 where a document begins, or with one document without them.
    """
    embeddings = model.get_input_embeddings()

    def scale(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        documents = int((kwargs["position_ids"] == 0).sum()) if "position_ids" in kwargs else 1
        embeddings.neftune_noise_alpha = alpha * math.sqrt(documents)

    return model.register_forward_pre_hook(scale, with_kwargs=True)
