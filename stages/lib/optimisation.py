"""conf/train in the words of TRL: optimizer, schedule, accumulation."""

from trl import SFTConfig

from stages.lib import numerics
from stages.lib.schema.train import Train


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
        lr_scheduler_type=p.scheduler.value,
        warmup_steps=p.warmup_ratio,
        weight_decay=p.weight_decay,
        max_grad_norm=p.max_grad_norm,
        gradient_checkpointing=p.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch",
        bf16=resolved.device == "cuda" and resolved.compute_dtype == "bfloat16",
        use_cpu=resolved.device == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
