"""How fast qlora_train trains an 8-billion-parameter Llama on this machine's GPU, against TRL, Unsloth and the card.

`python -m bench.train_cuda [train.gradient_checkpointing=true ...]`. The weights are random and made here once; no
data and no network are needed. Every measurement is a process of its own; the last line printed is one JSON object.
docs/benchmarks.md says what it counts. Exit status 2: there is no GPU.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from bench.train_cpu import LEFT_OUT, Params
from stages.lib import chat, config, files, numerics, packing
from stages.lib.schema.numerics import Determinism, Numerics

GIB = 2**30
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
"""arXiv:2407.21783, table 3."""


def main() -> int:
    arguments = parsed()
    p = config.load(Params, [f"pack.max_tokens={arguments.tokens}", *arguments.overrides])
    if arguments.measure:
        strict_for_the_stage = p.numerics if arguments.measure == "stage" else loose(p.numerics)
        numerics.settle(strict_for_the_stage, p.runtime.threads)
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.base, p, arguments.steps)))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"bench.train_cuda: torch {torch.__version__} sees no GPU here; nothing was measured", file=sys.stderr)
        return 2
    build(arguments.base, LLAMA_8B, seed=p.seed)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MEASUREMENTS}
    for name in ["limit", *[name for name in MEASUREMENTS if name != "limit"] * arguments.repeats, "limit"]:
        found[name].append(in_own_process(name, arguments))
        print(f"{name:<8} {json.dumps(found[name][-1])}", flush=True)
    machine = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "tokens": p.pack.max_tokens}
    print(json.dumps(machine | {"batch_size": p.train.batch_size} | summary(found)))
    return 0


def loose(n: Numerics) -> Numerics:
    return replace(n, determinism=Determinism.loose)


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats; null where a contender could not be measured, and then why."""
    medians: dict[str, dict[str, float]] = {}
    reasons = {}
    for name, results in found.items():
        if missing := [result["missing"] for result in results if "missing" in result]:
            reasons[name] = missing[0]
        else:
            medians[name] = {key: statistics.median(result[key] for result in results) for key in results[0]}
    stage, limit = medians["stage"], medians["limit"]["gflop_per_second"]
    line: dict[str, Any] = {
        "tokens_per_second": round(stage["tokens_per_second"], 1),
        "peak_gib": round(stage["peak_gib"], 2),
        "share_of_limit": round(stage["tokens_per_second"] * stage["gflop_per_token"] / limit, 3),
        "limit_tflop_per_second": round(limit / 1000, 1),
        "gflop_per_token": round(stage["gflop_per_token"], 2),
    }
    for name in ("trl", "unsloth"):
        other = medians.get(name)
        line |= {
            f"{name}_tokens_per_second": other and round(other["tokens_per_second"], 1),
            f"{name}_peak_gib": other and round(other["peak_gib"], 2),
            f"ratio_to_{name}": other and round(stage["tokens_per_second"] / other["tokens_per_second"], 2),
        }
    return line | ({"missing": reasons} if reasons else {})


def build(folder: Path, shape: dict[str, Any], *, seed: int) -> None:
    """A Llama of random bfloat16 weights with a tokenizer of a few words, one file a block, as a Hugging Face folder.

    What lies there already is kept; the index, written last, says that it is whole.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: number for number, word in enumerate(["<pad>", "<end>", "word"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] + '<end>' }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=template
    ).save_pretrained(folder)
    shaped = LlamaConfig(**shape, eos_token_id=1, pad_token_id=0, dtype="bfloat16")
    shaped.architectures = ["LlamaForCausalLM"]
    shaped.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shaped)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)

    def drawn(size: torch.Size) -> torch.Tensor:
        if len(size) == 1:  # of a norm
            return torch.ones(size, dtype=torch.bfloat16)
        weight = torch.empty(size, dtype=torch.bfloat16, device=device)
        return weight.normal_(std=shaped.initializer_range, generator=draw).cpu()

    blocks: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if ".layers." in name else "rest"
        blocks.setdefault(block, {})[name] = parameter.shape
    for block, sizes in blocks.items():
        weights = {name: drawn(size) for name, size in sizes.items()}
        save_file(weights, folder / f"model-{block}.safetensors", metadata={"format": "pt"})
    places = {name: f"model-{block}.safetensors" for block, sizes in blocks.items() for name in sizes}
    size = sum(2 * math.prod(size) for sizes in blocks.values() for size in sizes.values())
    files.write_json(index, {"metadata": {"total_size": size}, "weight_map": places})


def packs(p: Params, count: int, vocabulary: int) -> list[packing.Pack]:
    """Packs of one document each, random tokens, all but the first to be learned."""
    draw = random.Random(p.seed)
    found = []
    for number in range(count):
        ids = [draw.randrange(3, vocabulary) for _ in range(p.pack.max_tokens)]
        labels = [chat.IGNORED, *ids[1:]]
        found.append(packing.Pack(ids, labels, list(range(len(ids))), [str(number)]))
    return found


def vocabulary_of(base: Path) -> int:
    return int(files.read_json(base / "config.json")["vocab_size"])


def n_packs(p: Params, steps: int) -> int:
    return steps * p.train.batch_size * p.train.gradient_accumulation_steps


def train_as_the_stage(base: Path, p: Params, steps: int) -> dict[str, float]:
    """The training loop of qlora_train, without evaluations and samples between the steps."""
    from stages.lib import adapters, cost, estimate, models, training

    rows = packs(p, n_packs(p, steps), vocabulary_of(base))
    numerics.seed_everything(p.seed, p.numerics)
    model = adapters.add_adapter(models.load_base(base, p.numerics), p.lora)
    tokenizer = chat.load_tokenizer(base)
    start_counting_memory()
    trained = training.train(
        model,
        rows,
        rows[:1],
        replace(p.train, epochs=1.0, evals_per_epoch=1, samples=0),
        tokenizer=tokenizer,
        stop_ids=[1],
        resolved=numerics.resolve(p.numerics),
        seed=p.seed,
    )
    return {
        "tokens_per_second": trained.measured["train/tokens_per_second"],
        "gflop_per_token": cost.work(estimate.skeleton(base), p.lora, 1.0).useful() / 1e9,
        "peak_gib": peak_gib(),
    }


def train_with_trl(base: Path, p: Params, steps: int) -> dict[str, float]:
    """What one writes from TRL's documentation, with the same adapter, rows and NF4 base."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    resolved = numerics.resolve(p.numerics)
    compute = getattr(torch, resolved.compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=compute,
        device_map={"": resolved.device},
        local_files_only=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=p.numerics.double_quantization,
            bnb_4bit_compute_dtype=compute,
        ),
    )
    adapter = LoraConfig(
        r=p.lora.r, lora_alpha=p.lora.alpha, lora_dropout=p.lora.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return train_with_sft_trainer(model, adapter, base, p, steps)


def train_with_unsloth(base: Path, p: Params, steps: int) -> dict[str, Any]:
    """Unsloth's documented way: its model, its adapter, its checkpointing, TRL's trainer that it has patched."""
    try:
        from unsloth import FastLanguageModel
    except Exception as fault:  # not installed, or it refuses this torch, transformers or GPU: each in its own way
        return {"missing": f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"}
    model, _ = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=p.pack.max_tokens, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=p.lora.r,
        lora_alpha=p.lora.alpha,
        lora_dropout=p.lora.dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=p.seed,
    )
    return train_with_sft_trainer(model, None, base, p, steps)


def train_with_sft_trainer(model: Any, adapter: Any, base: Path, p: Params, steps: int) -> dict[str, float]:
    """TRL's trainer with its defaults over the same rows; the first steps are left out of the speed."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from stages.lib import products

    resolved = numerics.resolve(p.numerics)
    rows = packs(p, n_packs(p, steps), vocabulary_of(base))
    seconds: list[float] = []

    class Timing(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            products.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            products.synchronize()
            seconds.append(time.perf_counter() - self.started)

    start_counting_memory()
    with TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                max_length=p.pack.max_tokens,
                per_device_train_batch_size=p.train.batch_size,
                gradient_accumulation_steps=p.train.gradient_accumulation_steps,
                learning_rate=p.train.learning_rate,
                max_steps=steps,
                bf16=resolved.compute_dtype == "bfloat16",
                use_cpu=resolved.device == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=chat.load_tokenizer(base),
            peft_config=adapter,
            train_dataset=Dataset.from_list([{"input_ids": pack.input_ids, "labels": pack.labels} for pack in rows]),
            callbacks=[Timing()],
        )
        trainer.train()
    tokens = p.pack.max_tokens * p.train.batch_size * p.train.gradient_accumulation_steps
    counted = seconds[min(LEFT_OUT, steps - 1) :]
    return {"tokens_per_second": tokens * len(counted) / sum(counted), "peak_gib": peak_gib()}


def matrix_product_limit(base: Path, p: Params) -> dict[str, float]:
    """What products in the compute type reach for one batch, see stages/lib/products.py."""
    from stages.lib import estimate, products

    tokens = p.pack.max_tokens * p.train.batch_size
    limit = products.gflop_per_second(estimate.skeleton(base), numerics.resolve(p.numerics), tokens)
    return {"gflop_per_second": limit}


def start_counting_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most that torch held of the card since counting began; not a number without one."""
    import torch

    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else math.nan


MEASUREMENTS: dict[str, Callable[[Path, Params, int], dict[str, Any]]] = {
    "stage": train_as_the_stage,
    "trl": train_with_trl,
    "unsloth": train_with_unsloth,
    "limit": lambda base, p, steps: matrix_product_limit(base, p),
}


def in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.train_cuda", "--measure", name, "--steps", str(arguments.steps)]
    command += ["--tokens", str(arguments.tokens), "--base", str(arguments.base), *arguments.overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if name in ("trl", "unsloth"):  # out of memory, or versions that do not fit together: the others still count
            return {"missing": done.stderr.strip().splitlines()[-1][:300]}
        sys.exit(f"bench.train_cuda: {name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="of every contender, in turn")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each training")
    parser.add_argument("--tokens", type=int, default=2048, help="length of every sequence")
    parser.add_argument("--base", type=Path, default=Path(gettempdir(), "bench-llama-8b"), help="16 GB of weights")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help="make one measurement in this process")
    parser.add_argument("overrides", nargs="*", help="as for a stage: lora.r=8")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
