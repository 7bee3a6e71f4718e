"""How fast qlora_train trains on this machine's CPU, against a plain TRL script and against the matrix library's limit.

`python -m bench.train_cpu`, after `make repro` or any run of the stages up to tokenize_pack. Every measurement is a
process of its own; the last line printed is one JSON object. bench/README.md says what it counts and how to read it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.lib import chat, config, files, numerics, packing
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import Determinism, Numerics
from stages.lib.schema.pack import Pack
from stages.lib.schema.runtime import Runtime
from stages.lib.schema.train import Train
from stages.lib.stage import peak_mib

BASE = Path("models/base")
LEFT_OUT = 2  # first optimizer steps of a process: allocation and first use of every kernel


@dataclass
class Params:
    seed: int
    pack: Pack
    lora: Lora
    train: Train
    numerics: Numerics
    runtime: Runtime


def main() -> None:
    arguments = parsed()
    p = config.load(Params, arguments.overrides)
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](p, arguments.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}

    def measure(name: str) -> dict[str, float]:
        found[name].append(in_own_process(name, arguments))
        print(f"{name:<12} {json.dumps(found[name][-1])}", flush=True)
        return found[name][-1]

    speeds = {name: measure(name)["tokens_per_second"] for name in ("trl_default", "trl_float32")}
    plain = max(speeds, key=lambda name: speeds[name])
    for repeat in range(arguments.repeats):
        measure("limit")
        measure("stage")
        if repeat + 1 < arguments.repeats:
            measure("stage_loose")
    measure(plain)
    measure("limit")
    print(json.dumps(summary(found, plain)))


def summary(found: dict[str, list[dict[str, float]]], plain: str) -> dict[str, Any]:
    """Medians over the repeats, and the figures made of them."""

    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in found[name])

    stage, loose, trl = (median(name, "tokens_per_second") for name in ("stage", "stage_loose", plain))
    limit, work = median("limit", "gflop_per_second"), median("stage", "gflop_per_token")
    return {
        "tokens_per_second": round(stage, 1),
        "trl_tokens_per_second": round(trl, 1),
        "trl_variant": plain,
        "ratio_to_trl": round(stage / trl, 2),
        "share_of_limit": round(stage * work / limit, 3),
        "strict_cost": round(loose / stage - 1, 3),
        "limit_gflop_per_second": round(limit, 1),
        "gflop_per_token": round(work, 4),
        "peak_mib": max(result["peak_mib"] for result in found["stage"]),
        "trl_peak_mib": max(result["peak_mib"] for result in found[plain]),
        "threads": len(os.sched_getaffinity(0)),
        "repeats": len(found["stage"]),
    }


def train_as_the_stage(p: Params, steps: int, determinism: Determinism = Determinism.strict) -> dict[str, float]:
    """The training loop of qlora_train on its own packs, without evaluations and samples between the steps."""
    p.numerics.determinism = determinism
    numerics.settle(p.numerics, p.runtime.threads)
    from stages.lib import adapters, cost, estimate, models, training

    packs = packing.read(Path("data/packed/train"))
    packs = packs[: steps * p.train.batch_size * p.train.gradient_accumulation_steps]
    numerics.seed_everything(p.seed, p.numerics)
    model = adapters.add_adapter(models.load_base(BASE, p.numerics), p.lora)
    tokenizer = chat.load_tokenizer(BASE)
    trained = training.train(
        model,
        packs,
        packs[:1],
        replace(p.train, epochs=1.0, evals_per_epoch=1, samples=0),
        tokenizer=tokenizer,
        stop_ids=chat.stop_ids(tokenizer, BASE),
        resolved=numerics.resolve(p.numerics),
        seed=p.seed,
    )
    labelled = trained.metrics["train/tokens/labelled"] / trained.metrics["train/tokens"]
    return {
        "tokens_per_second": trained.measured["train/tokens_per_second"],
        "gflop_per_token": cost.work(estimate.skeleton(BASE), p.lora, labelled).useful() / 1e9,
        "peak_mib": peak_mib(),
    }


def train_with_plain_trl(p: Params, steps: int, *, is_float32: bool) -> dict[str, float]:
    """What one writes from TRL's documentation: the same rows, adapter, base and learning rate, its own packing."""
    numerics.settle(replace(p.numerics, determinism=Determinism.loose), p.runtime.threads)
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [row["messages"] for row in files.read_rows(Path("data/splits/train.parquet"))]
    seconds: list[float] = []
    tokens: list[int] = []

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            tokens[-1] += int(real)
            return super().training_step(model, inputs, *args, **kwargs)

    class Timing(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            tokens.append(0)
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with TemporaryDirectory() as scratch:
        own = {} if not is_float32 else {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}
        trainer = Counting(
            str(BASE),
            args=SFTConfig(
                output_dir=scratch,
                packing=True,
                max_length=p.pack.max_tokens,
                per_device_train_batch_size=2,
                gradient_checkpointing=True,
                learning_rate=p.train.learning_rate,
                max_steps=steps,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **own,
            ),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32 if is_float32 else torch.bfloat16,
            ),
            peft_config=LoraConfig(
                r=p.lora.r, lora_alpha=p.lora.alpha, lora_dropout=p.lora.dropout, target_modules="all-linear"
            ),
            train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
            callbacks=[Timing()],
        )
        trainer.train()
    return {"tokens_per_second": sum(tokens[LEFT_OUT:]) / sum(seconds[LEFT_OUT:]), "peak_mib": peak_mib()}


def matrix_product_limit(p: Params, steps: int) -> dict[str, float]:
    """What float32 products reach for one batch of full packs, see stages/lib/products.py."""
    numerics.settle(replace(p.numerics, determinism=Determinism.loose), p.runtime.threads)
    from stages.lib import estimate, products

    tokens = p.pack.max_tokens * p.train.batch_size
    limit = products.gflop_per_second(estimate.skeleton(BASE), numerics.resolve(p.numerics), tokens)
    return {"gflop_per_second": limit}


MEASUREMENTS: dict[str, Callable[[Params, int], dict[str, float]]] = {
    "stage": train_as_the_stage,
    "stage_loose": lambda p, steps: train_as_the_stage(p, steps, Determinism.loose),
    "trl_default": lambda p, steps: train_with_plain_trl(p, LEFT_OUT + 2, is_float32=False),
    "trl_float32": lambda p, steps: train_with_plain_trl(p, LEFT_OUT + 2, is_float32=True),
    "limit": matrix_product_limit,
}


def in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.train_cpu", "--measure", name, "--steps", str(arguments.steps)]
    done = subprocess.run([*command, *arguments.overrides], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench.train_cpu: {name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of the stage's loop, the limit between; 2 or more")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of the stage's loop")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help="make one measurement in this process")
    parser.add_argument("overrides", nargs="*", help="as for a stage: lora.r=8")
    return parser.parse_args()


if __name__ == "__main__":
    main()
