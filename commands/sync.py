"""make sync: bring every DVC experiment into MLflow, also those that DVC took from its cache without running a line.

Idempotent; an experiment that is there in full costs nothing. Runs whose process has died get their true status, and
runs that did not train themselves the name of the one that trained their adapter.
"""

import csv
import io
import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib import config, environment, files, tracking
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

SYNCED = "synced"
"""The tag of a run that has what could be had of one commit: the commit, then the md5 of what DVC's cache lacked."""


def main() -> int:
    import mlflow

    params = config.values()
    uri = tracking.address(params["runtime"]["tracking_uri"])
    try:
        return bring_in_all(tracking.connect(uri), params)
    except mlflow.MlflowException as fault:
        print(
            f"sync: no MLflow at {uri}: {str(fault).splitlines()[0]}. "
            "Change runtime.tracking_uri, or MLFLOW_TRACKING_URI where that is null.",
            file=sys.stderr,
        )
        return 2


def bring_in_all(experiment_id: str, params: Mapping[str, Any]) -> int:
    """Bring in what is new and end what is over; returns the exit status, 1 when an experiment did not come in."""
    import mlflow

    names, known = kept.references(), rows(experiment_id)
    fresh = {name: revision for name, (revision, _) in names.items() if not is_synced(known.get(name), revision)}
    ended = reconcile(experiment_id)
    wanted = [(name, kept.at_revision(revision), {"dvc.exp_rev": revision}) for name, revision in fresh.items()]
    name = tracking.key(params)
    if name not in names and (name in known or tracking.ended(name)):
        wanted.append((name, in_folder, {}))
    lost = 0
    for name, read, tags in wanted:
        try:
            bring_in(name, read, experiment_id, tags)
        except mlflow.MlflowException as fault:
            lost += 1
            print(f"sync: {name} did not come in: {str(fault).splitlines()[0]}", file=sys.stderr)
    linked = name_trainings(rows(experiment_id))
    print(
        f"sync: {len(names)} DVC experiments in MLflow, {len(fresh)} of them looked at; "
        f"{ended} runs whose process is gone were ended; {linked} newly traced to the run that trained their adapter"
    )
    return 1 if lost else 0


def rows(experiment_id: str) -> dict[str, Any]:
    """Every run of MLflow by the name of its experiment."""
    from mlflow import MlflowClient

    client, found = MlflowClient(), []
    page = client.search_runs([experiment_id], max_results=1000)
    found += page
    while page.token:
        page = client.search_runs([experiment_id], max_results=1000, page_token=page.token)
        found += page
    return {run.data.tags["dvc.exp_name"]: run for run in found if "dvc.exp_name" in run.data.tags}


def is_synced(run: Any | None, revision: str) -> bool:
    """Whether a run has what can be had of a commit: outputs that the cache lacked then, it lacks still."""
    synced = run.data.tags.get(SYNCED, "").split() if run else []
    return synced[:1] == [revision] and not any(cached(md5) for md5 in synced[1:])


def name_trainings(known: Mapping[str, Any]) -> int:
    """Tag each run that did not train with `trained_by`, the first that trained an adapter of the same md5.

    Returns how many tags are new.
    """
    from mlflow import MlflowClient

    ran, made = f"ran.{tracking.TRAINS}", f"md5.{tracking.ADAPTER}"
    trained: dict[str, str] = {}
    for run in sorted(known.values(), key=lambda run: run.data.tags.get(ran, "")):
        tags = run.data.tags
        if ran in tags and made in tags:
            trained.setdefault(tags[made], tags["dvc.exp_name"])
    new = 0
    for run in known.values():
        tags = run.data.tags
        source = trained.get(tags.get(made, ""))
        if source and ran not in tags and tags.get("trained_by") != source:
            MlflowClient().set_tag(run.info.run_id, "trained_by", source)
            new += 1
    return new


def in_folder(path: str) -> str | None:
    return Path(path).read_text() if Path(path).exists() else None


def bring_in(name: str, read: Reader, experiment_id: str, tags: dict[str, str]) -> None:
    """Fill in what the experiment's MLflow run does not have yet.

    That is parameters, metrics and their files, points of curves, samples, the data's digest and hashes of outputs.
    What lay in an output comes from DVC's cache, and stays away where the cache has it no more. What MLflow did not
    hear of how the stages ended, and of times and speeds, comes from runs/<name>.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

    pipeline, lock, params = (kept.parse(read(path) or "{}") for path in ("dvc.yaml", "dvc.lock", "params.yaml"))
    client = MlflowClient()
    run_id = tracking.run_of(name, experiment_id, params)
    run = client.get_run(run_id)
    is_new = not (run.data.params or run.data.metrics)
    tracking.log_parameters(run_id, params)
    attached = (
        set()
        if is_new
        else {file.path for folder in (None, "metrics") for file in client.list_artifacts(run_id, folder)}
    )
    metrics: list[Metric] = []
    lacking: list[str] = []
    current = kept.up_to_date(pipeline, lock, params)
    hashes = {out["path"]: out["md5"] for stage in current for out in lock["stages"][stage].get("outs", [])}
    if "qlora_train" in current:
        known = set()
        if not is_new:
            known = {(key, point.step) for key in CURVES.values() for point in client.get_metric_history(run_id, key)}
        points = curve(read("plots/train.csv") or "")
        metrics += [point for point in points if (point.key, point.step) not in known]
        if "samples.json" not in attached:
            adapter = cached(hashes["models/adapter"])
            lacking += [] if adapter else [hashes["models/adapter"]]
            log_samples(run_id, adapter)
    if "dedup_split" in current and not run.inputs.dataset_inputs:
        splits = cached(hashes["data/splits"])
        lacking += [] if splits else [hashes["data/splits"]]
        tracking.log_dataset(run_id, {file: path for file, path in splits.items() if file.endswith(".parquet")})
    held = set(run.data.metrics)
    for stage in current:
        path = f"metrics/{stage}.json"
        text = read(path)
        if text and path not in attached:
            client.log_text(run_id, text, path)
        for chosen in (tracking.compared(json.loads(text or "{}")), measured_here(name, stage)):
            metrics += [Metric(key, value, run.info.start_time, 0) for key, value in chosen.items() if key not in held]
            held |= chosen.keys()
    ended = tracking.ended(name)
    was_run = "process" in run.data.tags or bool(ended)
    tags |= {tag: value for tag, value in ended.get("tags", {}).items() if tag not in run.data.tags}
    left_at = {**tags, **run.data.tags}.get("failed_stage")
    if not left_at and run.info.status in ("FAILED", "KILLED"):
        left_at = run.data.tags.get("stage")
    has_succeeded = "dvc.exp_rev" in tags and left_at in current  # since then, from DVC's cache
    for tag in ("failed_stage", "failure") if has_succeeded else ():
        tags.pop(tag, None)
        if tag in run.data.tags:
            client.delete_tag(run_id, tag)
    tags |= {f"md5.{path}": md5 for path, md5 in hashes.items()}
    if sweep := params.get("sweep", {}).get("id"):
        tags["sweep_id"] = sweep
    if not was_run:
        tags["dvc.cached"] = "true"
    for first in range(0, len(metrics), 1000):  # MLflow takes no more metrics at a time
        client.log_batch(run_id, metrics=metrics[first : first + 1000])
    if "dvc.exp_rev" in tags:
        tags[SYNCED] = " ".join([tags["dvc.exp_rev"], *lacking])
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    if has_succeeded or "process" not in run.data.tags:
        client.set_terminated(run_id, "FINISHED" if has_succeeded else ended.get("status", "FINISHED"))


def measured_here(name: str, stage: str) -> dict[str, float]:
    """Of times and speeds that a stage left in runs/<name> those that the runs table shows."""
    path = environment.root() / "runs" / name / f"{stage}.json"
    found = files.read_json(path) if path.exists() else {}
    return tracking.compared({key: value for key, value in found.items() if isinstance(value, (int, float))})


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
    """End the runs that this machine left RUNNING and whose process is gone; returns how many.

    A process that could end its stage, but not tell MLflow, left its status in runs/<name>; others were killed.
    """
    from mlflow import MlflowClient

    client, changed = MlflowClient(), 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        process = run.data.tags.get("process", "")
        host, _, number = process.partition(":")
        if host != socket.gethostname() or is_alive(number):
            continue
        left = tracking.ended(run.data.tags["dvc.exp_name"])
        if left.get("process") != process:
            tags = {"failure": "the process ended without a word (killed, or out of memory)"}
            left = {"status": "KILLED", "tags": tags}
        for tag, value in left["tags"].items():
            client.set_tag(run.info.run_id, tag, value)
        client.set_terminated(run.info.run_id, left["status"])
        changed += 1
    return changed


def is_alive(process: str) -> bool:
    """Whether the process of a tag `pid:start` runs still, see tracking.process."""
    number, _, start = process.partition(":")
    return number.isdigit() and start == str(tracking.started(int(number)))


if __name__ == "__main__":
    sys.exit(main())
