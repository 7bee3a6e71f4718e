"""A tiny trained model for the tests of merge and export: base, a random adapter, held-out rows, evaluated answers."""

import json
import shutil
from pathlib import Path

from stages.lib import files, records
from stages.lib.comparison import PREDICTIONS
from stages.lib.measures import SCORES
from stages.lib.schema.merge import Base, Combination, Dtype, Merge
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization

NUMERICS = Numerics(
    determinism=Determinism.strict,
    compute_dtype=ComputeDtype.auto,
    adapter_dtype=ComputeDtype.auto,
    device=Device.cpu,
    quantization=Quantization.nf4,
    double_quantization=True,
)
MERGE = Merge(
    base=Base.dequantized,
    dtype=Dtype.float32,
    max_kl=1e-3,
    rows=4,
    answers=3,
    adapters={},
    weight=1.0,
    combination=Combination.cat,
    density=0.5,
    seed=1,
)


def make_adapter(base: Path, folder: Path, *, scale: float = 0.05) -> None:
    """A LoRA adapter whose B is random, not zero: r 4, alpha 8."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.lib import models

    torch.manual_seed(1)
    recipe = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(models.load_dense(base, NUMERICS), recipe)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    tuned.save_pretrained(folder)


def make_inputs(base: Path) -> None:
    """What merge and quantize_export read, in the working folder."""
    shutil.copytree(base, "models/base")
    source = {"id": "tiny/llama", "origin": "tests", "revision": "0" * 40, "weights": "dequantized from Q4_1"}
    files.write_json(Path("models/base/source.json"), source)
    make_adapter(base, Path("models/adapter"))
    files.write_json(Path("models/adapter/trained.json"), {"method": "lora"})
    rows = [
        records.make(
            [{"role": "user", "content": f"the fox {i} jumps"}, {"role": "assistant", "content": answer}],
            group=f"g{i}",
            source="tests",
            task=task,
        )
        for i in range(6)
        for task, answer in (("parameters", json.dumps({"fox": f"dog {i}"})), ("summary", f"a lazy dog {i}"))
    ]
    records.write(Path("data/splits/test.parquet"), rows)
    records.write(Path("data/splits/validation.parquet"), rows[:2])
    records.write(Path("data/splits/train.parquet"), rows[2:])
    predictions = [
        {
            "arm": arm,
            "id": row["id"],
            "task": row["task"],
            "source": row["source"],
            "language": None,
            "length": "short",
            "prompt_sha": "",
            "answer": row["messages"][-1]["content"] if arm == "tuned" else "the",
            "reference": row["messages"][-1]["content"],
            "n_tokens": 5,
            "n_bytes": 20,
            "nll": 1.0,
            "new_tokens": 5,
            "stops": 0.0,
            "label": None,
            "predicted": None,
            **dict.fromkeys(SCORES),
        }
        for arm in ("base", "fewshot", "tuned")
        for row in rows
    ]
    files.write_rows(Path("reports/evaluation/predictions.parquet"), predictions, PREDICTIONS)
    stem = "test/parameters/field_f1"
    figures = {"base": 0.0, "fewshot": 0.25, "tuned": 0.75, "delta": 0.75, "low": 0.5, "high": 0.875}
    files.write_json(Path("metrics/evaluate.json"), {f"{stem}/{name}": value for name, value in figures.items()})
