"""Made-up runs in a store of their own, to look at MLflow's views with: python -m bench.mlflow_runs FOLDER [RUNS]

Every number is SYNTHETIC, drawn from a formula, and the sweep is called so; only the shape is that of real runs: the
keys, how many points, the tags, all through stages.lib.tracking. Nothing here is a result.
"""

import itertools
import os
import random
import sys
from pathlib import Path
from typing import Any

from stages.lib import config, tracking

SWEEP = "synthetic"
GRID = {
    "lora.r": [2, 4, 8, 16, 32],
    "train.learning_rate": [5.0e-5, 1.0e-4, 2.0e-4, 4.0e-4, 8.0e-4],
    "lora.target_modules": ["attention", "all-linear"],
}
STEPS = 120


def main() -> int:
    folder, count = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 50
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"DVC_ROOT": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    params = config.values()
    store = tracking.connect(tracking.address(None))
    points = itertools.cycle(itertools.product(*GRID.values()))
    for i, values in enumerate(itertools.islice(points, count)):
        write(store, f"{SWEEP}-{i:03}", changed(params, dict(zip(GRID, values, strict=True)) | {"seed": i // 50}), i)
    print(f"{count} synthetic runs in sqlite:///{folder}/mlflow.db")
    return 0


def changed(params: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Parameters with some keys set, as -S sets them."""
    copy = {section: dict(found) if isinstance(found, dict) else found for section, found in params.items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            copy[section][name] = value
        else:
            copy[section] = value
    return copy | {"sweep": {"id": SWEEP}}


def write(store: str, name: str, params: dict[str, Any], i: int) -> None:
    """One finished run: parameters, tags, curves of a real length, and the final metrics."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

    draw = random.Random(i)
    r, rate = params["lora"]["r"], params["train"]["learning_rate"]
    distance = abs(rate / 2.0e-4 - 1) / 4
    floor = 1.5 + distance / 4 + 0.1 / r + (0.05 if params["lora"]["target_modules"] == "attention" else 0.0)
    floor += draw.gauss(0, 0.01)
    run_id = tracking.run_of(name, store, params)
    tracking.log_parameters(run_id, params)
    points = [Metric("val/loss", floor + 1.2 * 0.97**step, 0, step) for step in range(0, STEPS + 1, 12)]
    points += [Metric("train/loss", floor + 1.3 * 0.96**s + draw.gauss(0, 0.03), 0, s) for s in range(1, STEPS + 1)]
    points += [Metric("train/learning_rate", rate * (1 - s / STEPS), 0, s) for s in range(1, STEPS + 1)]
    points += [Metric("train/grad_norm", abs(draw.gauss(1, 0.2)), 0, s) for s in range(1, STEPS + 1)]
    final = {
        "val/loss/base": 2.7,
        "val/loss/tuned": floor,
        "adapter/trainable_parameters": r * 152_640,
        "train/tokens_per_second": draw.gauss(420, 20),
        "test/extract/field_f1/tuned": 0.9 - distance / 5 + draw.gauss(0, 0.01),
        "test/extract/json_valid/tuned": 0.97 + draw.gauss(0, 0.005),
    }
    points += [Metric(key, value, 0, 0) for key, value in tracking.compared(final).items()]
    tags = {"sweep_id": SWEEP, "stage": "evaluate", "mlflow.note.content": "SYNTHETIC: made up to look at the views"}
    client = MlflowClient()
    client.log_batch(run_id, metrics=points, tags=[RunTag(key, value) for key, value in tags.items()])
    client.set_terminated(run_id)


if __name__ == "__main__":
    sys.exit(main())
