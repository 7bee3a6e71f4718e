"""Experiments as DVC would keep them, made here; predictions lie in a folder instead of a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.lib import comparison, files
from stages.lib.experiments import kept
from stages.lib.experiments.kept import Experiment
from stages.lib.measures import SCORES

MEASURED = ("exact_match", "rouge_l", "field_f1")


def experiment(
    name: str,
    *,
    r: int = 8,
    modules: str = "attention",
    seed: int = 42,
    sweep_id: str | None = "grid",
    data: str = "d1",
    trainable: float = 1e6,
    stages: tuple[str, ...] = (),
) -> Experiment:
    """One that went up to evaluate; its weights and answers have hashes of their own."""
    return Experiment(
        name,
        revision=f"rev-{name}",
        baseline="base",
        params={
            "seed": seed,
            "lora": {"r": r, "alpha": 16.0, "alpha_mode": "fixed", "target_modules": modules, "method": "lora"},
            "base_model": {"id": "tiny/llama"},
            "sweep": {"id": sweep_id},
            "runtime": {"threads": None},
        },
        stages=stages,
        metrics={
            "base_model": {"model/parameters": 134e6},
            "dedup_split": {"rows/train": 96},
            "qlora_train": {"train/tokens": 1e4, "adapter/trainable_parameters": trainable},
        },
        outs={"data/packed": data, "models/base": "b", "models/adapter": name, "reports/evaluation": name},
    )


def predictions(scores: Sequence[float], *, task: str = "parameters", start: int = 0) -> list[dict[str, Any]]:
    """One row of the tuned model for each score; its loss falls as the score rises."""
    empty = dict.fromkeys(comparison.PREDICTIONS.names)
    told = {"arm": "tuned", "task": task, "source": "numpy", "length": "short", "prompt_sha": "", "n_tokens": 4}
    return [
        empty
        | told
        | {"id": f"{start + number:03}", "answer": "", "reference": "", "n_bytes": 12, "stops": 1.0}
        | {"nll": 4 * (2 - score)}
        | {measure: float(score) for measure in SCORES if measure in MEASURED}
        for number, score in enumerate(scores)
    ]


def keep(
    monkeypatch: pytest.MonkeyPatch, folder: Path, found: Mapping[str, tuple[Experiment, Sequence[Mapping[str, Any]]]]
) -> None:
    """Make these all the experiments there are, the first one the earliest."""
    for name, (_, rows) in found.items():
        files.write_rows(folder / f"{name}.parquet", rows, comparison.PREDICTIONS)
    experiments = {name: each for name, (each, _) in found.items()}
    monkeypatch.setattr(kept, "every", lambda: [experiments[name] for name in sorted(experiments)])
    monkeypatch.setattr(kept, "references", lambda: {name: (f"rev-{name}", "base") for name in experiments})
    monkeypatch.setattr(kept, "find", lambda name: experiments[name])
    monkeypatch.setattr(kept, "files", lambda each, out: {"predictions.parquet": folder / f"{each.name}.parquet"})
