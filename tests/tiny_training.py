"""Trainings of seconds: an adapter on the tiny random Llama, six conversations."""

from pathlib import Path
from typing import Any

from stages.lib import adapters, chat, checkpoints, models, numerics, packing, training
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization
from stages.lib.schema.train import Optimizer, Scheduler, Train

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)
LORA = Lora(4, 8.0, 0.1, "all-linear")
TRAIN = Train(
    learning_rate=1.0e-2,
    epochs=1.0,
    batch_size=1,
    gradient_accumulation_steps=1,
    optimizer=Optimizer.adamw_torch,
    scheduler=Scheduler.cosine,
    warmup_ratio=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    neftune_alpha=0.0,
    gradient_checkpointing=False,
    evals_per_epoch=2,
    eval_steps=None,
    early_stopping_patience=0,
    early_stopping_threshold=0.0,
    samples=0,
    sample_tokens=8,
)


def conversations(n: int) -> list[list[dict[str, str]]]:
    """A question each and an answer of 1 to n words."""
    return [
        [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": "fox " * (i + 1)}] for i in range(n)
    ]


def packs(tokenizer: Any, n: int = 6) -> list[packing.Pack]:
    """One conversation each: labelled tokens differ from pack to pack."""
    rows = [packing.Tokens.of([(str(i), chat.encode(tokenizer, turns))]) for i, turns in enumerate(conversations(n))]
    return [pack for row in rows for table in packing.packs(row, max_tokens=256) for pack in packing.packs_of(table)]


def fit(
    folder: Path,
    tokenizer: Any,
    p: Train,
    *,
    lora: Lora = LORA,
    seed: int = 0,
    prepared: Any = None,
    rows: Any = None,
    points: checkpoints.Checkpoints | None = None,
) -> Any:
    numerics.seed_everything(seed, NF4)
    model = prepared or adapters.add_adapter(models.load_base(folder, NF4), lora)
    trained = training.train(
        model,
        rows or packs(tokenizer),
        packs(tokenizer, 3),
        p,
        tokenizer=tokenizer,
        stop_ids=chat.stop_ids(tokenizer, folder),
        resolved=numerics.resolve(NF4),
        seed=seed,
        checkpoints=points,
    )
    return trained, {name: value.detach().clone() for name, value in adapters.trainable(model).items()}
