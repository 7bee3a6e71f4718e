"""make sync: bring every DVC experiment into MLflow, also those that DVC took from its cache without running a line.

Idempotent. Runs whose process has died are given their true status.
"""

import csv
import io
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.lib import config, tracking
from stages.lib.experiments import kept
from stages.lib.experiments.kept import Reader
from stages.lib.stage import cached

CURVES = {
    "val_loss": "val/loss",
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens_seen",
}
"""Columns of plots/train.csv and the metrics they are in MLflow; it draws the first one a run gets before others."""


def main() -> int:
    import mlflow

    params = config.values()
    uri = tracking.address(params["runtime"]["tracking_uri"])
    try:
        experiment_id = tracking.connect(uri)
    except mlflow.MlflowException as fault:
        print(
            f"sync: no MLflow at {uri}: {str(fault).splitlines()[0]}. "
            "Change runtime.tracking_uri, or MLFLOW_TRACKING_URI where that is null.",
            file=sys.stderr,
        )
        return 2
    names = kept.references()
    for name, (revision, _) in names.items():
        bring_in(name, kept.at_revision(revision), experiment_id, {"dvc.exp_rev": revision})
    if has_run(name := tracking.key(params), experiment_id):
        bring_in(name, in_folder, experiment_id, {})
    ended = reconcile(experiment_id)
    print(f"sync: {len(names)} DVC experiments in MLflow; {ended} runs whose process is gone were ended")
    return 0


def in_folder(path: str) -> str | None:
    return Path(path).read_text() if Path(path).exists() else None


def has_run(name: str, experiment_id: str) -> bool:
    from mlflow import MlflowClient

    return bool(MlflowClient().search_runs([experiment_id], f"tags.`dvc.exp_name` = '{name}'", max_results=1))


def bring_in(name: str, read: Reader, experiment_id: str, tags: dict[str, str]) -> None:
    """Fill in what the experiment's MLflow run does not have yet.

    That is parameters, metrics and their files, points of curves, samples, the data's digest and hashes of outputs.
    What lay in an output comes from DVC's cache, and stays away where the cache has it no more.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

    pipeline, lock, params = (yaml.safe_load(read(path) or "{}") for path in ("dvc.yaml", "dvc.lock", "params.yaml"))
    was_run = has_run(name, experiment_id)
    run_id = tracking.run_of(name, experiment_id)
    tracking.log_parameters(run_id, params)
    client = MlflowClient()
    run = client.get_run(run_id)
    attached = {file.path for folder in (None, "metrics") for file in client.list_artifacts(run_id, folder)}
    metrics: list[Metric] = []
    current = kept.up_to_date(pipeline, lock, params)
    hashes = {out["path"]: out["md5"] for stage in current for out in lock["stages"][stage].get("outs", [])}
    if "qlora_train" in current:
        known = {(key, point.step) for key in CURVES.values() for point in client.get_metric_history(run_id, key)}
        points = curve(read("plots/train.csv") or "")
        metrics += [point for point in points if (point.key, point.step) not in known]
        if "samples.json" not in attached:
            log_samples(run_id, cached(hashes["models/adapter"]))
    if "dedup_split" in current and not run.inputs.dataset_inputs:
        splits = cached(hashes["data/splits"])
        tracking.log_dataset(run_id, {file: path for file, path in splits.items() if file.endswith(".parquet")})
    for stage in current:
        path = f"metrics/{stage}.json"
        text = read(path)
        if text and path not in attached:
            client.log_text(run_id, text, path)
        chosen = tracking.compared(json.loads(text or "{}"))
        start = run.info.start_time
        metrics += [Metric(key, value, start, 0) for key, value in chosen.items() if key not in run.data.metrics]
    tags |= {f"md5.{path}": md5 for path, md5 in hashes.items()}
    if sweep := params.get("sweep", {}).get("id"):
        tags["sweep_id"] = sweep
    if not was_run:
        tags["dvc.cached"] = "true"
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(key, value) for key, value in tags.items()])
    if not was_run:
        client.set_terminated(run_id, "FINISHED")


def curve(table: str) -> list[Any]:
    """The points of plots/train.csv as training logs them: the validation loss where it is new, from step 0 on."""
    from mlflow.entities import Metric

    rows = list(csv.DictReader(io.StringIO(table)))
    every = tracking.steps_per_point(len(rows))
    points: list[Metric] = []
    for column, key in CURVES.items():
        found = [(int(row["step"]), row[column]) for row in rows if column in row]
        if column == "val_loss":  # each row repeats the last one; the first is that of the base, before any step
            changes = [i for i in range(1, len(found)) if found[i][1] != found[i - 1][1]]
            per_point = tracking.steps_per_point(len(changes))
            changes = changes[per_point - 1 :: per_point]
            found = [(0, value) for _, value in found[:1]] + [found[i] for i in changes]
        else:
            found = [(step, value) for step, value in found if step % every == 0]
        points += [Metric(key, float(value), 0, step) for step, value in found if value]
    return points


def log_samples(run_id: str, adapter: Mapping[str, Path]) -> None:
    """Show the samples of a training as the table that training itself logs."""
    from mlflow import MlflowClient

    if "samples.jsonl" in adapter:
        rows = [json.loads(line) for line in adapter["samples.jsonl"].read_text(encoding="utf-8").splitlines()]
        if rows:
            columns = {column: [row[column] for row in rows] for column in rows[0]}
            MlflowClient().log_table(run_id, columns, "samples.json")


def reconcile(experiment_id: str) -> int:
    """End the runs that this machine left RUNNING and whose process is gone; returns how many."""
    from mlflow import MlflowClient

    client, ended = MlflowClient(), 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        host, _, process = run.data.tags.get("process", ":").partition(":")
        if host == socket.gethostname() and process.isdigit() and not _is_alive(int(process)):
            client.set_tag(run.info.run_id, "failure", "the process ended without a word (killed, or out of memory)")
            client.set_terminated(run.info.run_id, "KILLED")
            ended += 1
    return ended


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
