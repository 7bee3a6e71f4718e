"""What leaves a stage as numbers: metrics/<stage>.json first, then the same numbers in MLflow.

One MLflow run holds one experiment, whichever stages of it ran in whichever process; it is found again by its key.
MLflow being away never stops a stage: `make sync` brings in later what is missing.
"""

import fnmatch
import hashlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from stages.lib import config, environment, files
from stages.lib.errors import Pruned

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "finetuning"
COMPARED = (  # the metrics of MLflow's runs table, most wanted first; metrics/*.json hold all of them
    "val/loss",
    "val/loss/base",
    "val/loss/tuned",
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_seen",
    "train/tokens_per_second",
    "adapter/trainable_parameters",
    "test/*/loss/tuned",
    "test/*/accuracy/base",
    "test/*/accuracy/fewshot",
    "test/*/accuracy/tuned",
    "test/*/field_f1/base",
    "test/*/field_f1/fewshot",
    "test/*/field_f1/tuned",
    "test/*/json_valid/tuned",
    "test/*/exact_match/tuned",
    "test/*/rouge_l/tuned",
    "general/perplexity/base",
    "general/perplexity/tuned",
    "merge/kl/mean",
    "export/*/kl/mean",
)
"""Nothing of the stages before training: the first metric a run gets is then val/loss, with which MLflow compares."""

NOT_COMPARED = "test/*_ood/*"  # rows out of distribution have their place on the evaluation page

MAX_OF_A_STAGE, MAX_FORMATS = 13, 7
"""With them 10 metrics named in full, 13 of evaluate and 7 export formats are 30, more than which nobody compares."""

MAX_POINTS = 1000
"""Of a live curve: no screen shows more, and a store of many long runs stays quick."""

MAX_VALUE = 6000
"""Characters of a parameter that MLflow takes."""

TRAINS, ADAPTER = "qlora_train", "models/adapter"

ENDED = "ended.json"
"""In runs/<key>: how the last stage of an experiment ended, for `make sync` where MLflow did not hear of it."""

UNTRACKED = ("runtime", "sweep", "checked")  # sections of params.yaml that cannot change a result

AFTERWARDS = ("merge", "export")  # what is made of a trained model: to choose again makes no other experiment

measured: dict[str, Any] = {}
"""Times, speeds, memory, host of this process: for runs/<key>/<stage>.json and MLflow, never for a DVC output."""

_lost: list[str] = []  # why MLflow did not get everything; empty while it does


class Killed(SystemExit):
    """The process was asked to end (SIGTERM)."""


def key(params: Mapping[str, Any], repository: Path = Path()) -> str:
    """Which experiment this process works for: DVC's name, or, without one, what determines the result.

    That is the parameters, the code, the environment's lock, templates, benchmarks and the user's data. Of data that
    DVC tracks its .dvc file is read, which holds the hash.
    """
    if name := os.environ.get("DVC_EXP_NAME"):
        return name
    tracked = {section: values for section, values in params.items() if section not in UNTRACKED}
    digest = hashlib.sha256(json.dumps(tracked, sort_keys=True).encode())
    code = sorted(path for path in (repository / "stages").rglob("*") if path.suffix in (".py", ".jinja"))
    templates = sorted((repository / "conf/prompt").glob("*.jinja"))
    given = [repository / name for name in ("requirements.lock", params["prompt"]["template"])]
    for path in (*code, *templates, *given):
        digest.update(files.sha256(path).encode() if path.is_file() else b"absent")
    for name in (params["data"]["path"], params["dedup"]["contamination"]["benchmarks"]):
        digest.update(content(repository / name).encode())
    return f"repro-{digest.hexdigest()[:8]}"


def content(path: Path) -> str:
    """A hash of a file, of all files of a folder, or of the .dvc file that stands for either."""
    pointer = path.with_name(f"{path.name}.dvc")
    if pointer.exists():
        return files.sha256(pointer)
    if path.is_dir():
        held = {str(file.relative_to(path)): files.sha256(file) for file in path.rglob("*") if file.is_file()}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    return files.sha256(path) if path.is_file() else "absent"


def address(configured: str | None) -> str:
    """MLflow's address: configured, or from MLFLOW_TRACKING_URI, or the SQLite file in the user's repository.

    Absolute, because experiments run in temporary copies of the repository that are deleted afterwards.
    """
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{environment.root()}/mlflow.db"


def connect(uri: str) -> str:
    """Point MLflow at the store, creating store and experiment once, under a lock; returns the experiment's id.

    Four processes that start together on a missing SQLite file would otherwise crash three of them.
    """
    import mlflow

    _be_brief()
    mlflow.set_tracking_uri(uri)
    with _lock():
        if found := mlflow.get_experiment_by_name(EXPERIMENT):
            return str(found.experiment_id)
        is_local = uri.startswith("sqlite:")
        artifacts = f"file://{environment.root()}/mlartifacts" if is_local else None
        # MLflow's pages open on the runs of such an experiment, and on traces of chats otherwise
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts, tags=kind)
        except mlflow.MlflowException:  # another machine, which our lock does not hold back, was first
            if found := mlflow.get_experiment_by_name(EXPERIMENT):
                return str(found.experiment_id)
            raise


def client(uri: str | None = None) -> "MlflowClient":
    """MLflow's client of a store, by default of the one that `connect` chose. It makes a store that is missing."""
    from mlflow import MlflowClient

    _be_brief()
    return MlflowClient(uri)


def _be_brief() -> None:
    """Let MLflow ask a server that is away twice, not for minutes, and say little."""
    os.environ |= {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _lock() -> FileLock:
    folder = environment.root() / "runs"
    folder.mkdir(exist_ok=True)
    return FileLock(folder / "tracking.lock", timeout=120)


def run_of(name: str, experiment_id: str, params: Mapping[str, Any]) -> str:
    """The id of the one MLflow run of an experiment, created when there is none yet.

    A run of that name with other parameters is of an attempt that left no experiment, or of one that `dvc exp run -f`
    replaced: it keeps its record under <name>@<its id>.
    """
    store = client()
    with _lock():
        for run in store.search_runs([experiment_id], named(name), max_results=1):
            run_id = str(run.info.run_id)
            if not contradicts(run.data.params, params):
                return run_id
            log.warning("%s: its row in MLflow was of other parameters and is now %s@%s", name, name, run_id[:8])
            store.set_tag(run_id, "dvc.exp_name", f"{name}@{run_id[:8]}")
            store.update_run(run_id, name=f"{name}@{run_id[:8]}")
            if "sweep_id" in run.data.tags:
                store.delete_tag(run_id, "sweep_id")
        return str(store.create_run(experiment_id, run_name=name, tags={"dvc.exp_name": name}).info.run_id)


def named(name: str) -> str:
    """MLflow's filter for the run of an experiment."""
    quote = '"' if "'" in name else "'"
    return f"tags.`dvc.exp_name` = {quote}{name}{quote}"


def contradicts(logged: Mapping[str, str], params: Mapping[str, Any]) -> bool:
    """Whether a run's parameters are of another experiment: one that both have and that can change its result."""
    sections = {name: values for name, values in params.items() if name not in (*UNTRACKED, *AFTERWARDS)}
    return any(logged.get(name, str(value)) != str(value) for name, value in config.flat(sections).items())


@contextmanager
def run(stage: str, params: Mapping[str, Any]) -> Iterator[None]:
    """Hold the experiment's MLflow run open while a stage works, and leave its true status behind.

    Args: params: the whole of params.yaml as it holds for this process, see `parameters`.
    """
    measured.setdefault("host", socket.gethostname())
    measured["environment"] = environment.describe()
    name = key(params)
    _softly(lambda: _open(stage, name, params))
    try:
        yield
    except BaseException as fault:
        status = "KILLED" if isinstance(fault, (Killed, KeyboardInterrupt, Pruned)) else "FAILED"
        tags = {"failed_stage": stage, "failure": f"{type(fault).__name__}: {fault}"[:5000]}
        _write_ended(name, status, tags)
        _try(lambda: _close(status, tags))
        raise
    tags = {f"ran.{stage}": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if stage == TRAINS and Path(ADAPTER).is_dir():
        tags[f"md5.{ADAPTER}"] = dvc_md5(Path(ADAPTER))
    _write_ended(name, "FINISHED", tags)
    _softly(lambda: _log_measured(stage))
    _try(lambda: _close("FINISHED", tags))
    _write_measured(stage, name)
    if _lost:
        log.warning("MLflow did not get everything (%s). `make sync` brings it in.", _lost[0])


def _open(stage: str, name: str, params: Mapping[str, Any]) -> None:
    import mlflow

    experiment_id = connect(address(params["runtime"]["tracking_uri"]))
    os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "5")
    run_id = run_of(name, experiment_id, params)
    found = mlflow.start_run(run_id=run_id, log_system_metrics=True).data.tags
    earlier = upstream(stage)
    if found.get("failed_stage") in (None, stage, *earlier):  # these have succeeded since, or are tried again
        for tag in ("failed_stage", "failure"):
            if tag in found:
                mlflow.delete_tag(tag)
    tags = {
        "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "git.commit": _git("rev-parse", "HEAD"),
        "sweep_id": params["sweep"]["id"] or "",
        "stage": stage,
        "process": process(),
    }
    mlflow.set_tags({tag: value for tag, value in tags.items() if value})
    log_parameters(run_id, params)
    for before in earlier:
        _log_reported(before)


def open_run() -> tuple[str, str] | None:
    """MLflow's address and the id of the run that this process holds open; None while there is none."""
    if not _is_open():
        return None
    import mlflow

    run = mlflow.active_run()
    return (mlflow.get_tracking_uri(), run.info.run_id) if run else None


def join_run(uri: str, run_id: str) -> None:
    """Add to a run from here on that another process holds open; its status is that one's affair."""

    def join() -> None:
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.start_run(run_id=run_id)

    _try(join)


def log_parameters(run_id: str, params: Mapping[str, Any]) -> None:
    """Log parameters flat (`lora.r`); keys the run has already stay as they are."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient()
    known = client.get_run(run_id).data.params
    flat = {name: str(value) for name, value in config.flat(shown(params)).items() if name not in known}
    client.log_batch(run_id, params=[Param(name, value) for name, value in flat.items() if len(value) <= MAX_VALUE])
    for name, value in flat.items():
        if len(value) > MAX_VALUE:  # MLflow would cut it without a word
            client.log_text(run_id, value, f"long/{name}.txt")


def shown(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of params.yaml what a row of MLflow shows: of a sweep only its id, all else of it belongs to its driver."""
    rows = {name: values for name, values in params.items() if name != "checked"}
    return rows | ({"sweep": {"id": params["sweep"]["id"]}} if "sweep" in params else {})


def process() -> str:
    """Which process this is, host:pid:start; the start tells it from a later one that got the same number."""
    return f"{socket.gethostname()}:{os.getpid()}:{started(os.getpid())}"


def started(pid: int) -> int | None:
    """When the process of a number began, clock ticks after the machine did; None where there is none.

    Source: proc(5), field 22 of /proc/<pid>/stat. A process that ended and waits for its parent (Z) counts as none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def dvc_md5(folder: Path) -> str:
    """The hash under which DVC 3 records a folder: md5 of the sorted JSON list of its files' md5 and relative path."""
    listed = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(folder).as_posix()}
        for path in folder.rglob("*")
        if path.is_file()
    ]
    text = json.dumps(sorted(listed, key=lambda file: file["relpath"]), sort_keys=True)
    return hashlib.md5(text.encode()).hexdigest() + ".dir"


def _close(status: str, tags: Mapping[str, str]) -> None:
    import mlflow

    if mlflow.active_run():
        try:
            mlflow.set_tags(dict(tags))
        finally:
            mlflow.end_run(status)


def _softly(action: Callable[[], object]) -> None:
    """Do something with MLflow, unless it was out of reach before: waiting for it again would slow every step."""
    if not _lost:
        _try(action)


def _try(action: Callable[[], object]) -> None:
    """Do something with MLflow; when it cannot be had, remember why and carry on."""
    try:
        action()
    except Exception as fault:
        _lost.append(f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}")


def _is_open() -> bool:
    return "mlflow" in sys.modules and not _lost and sys.modules["mlflow"].active_run() is not None


def upstream(stage: str, stages: Mapping[str, Any] | None = None) -> list[str]:
    """The stages this one depends on, also through others: what others report may be of another experiment.

    Args: stages: those of a dvc.yaml; by default that of the working folder.
    """
    stages = stages or yaml.load(Path("dvc.yaml").read_text(), yaml.CSafeLoader)["stages"]
    makers = {
        path: name for name in stages for kind in ("outs", "metrics", "plots") for path in paths(stages, name, kind)
    }
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        direct = {makers[dep] for dep in paths(stages, waiting.pop(), "deps") if dep in makers}
        waiting += direct - found
        found |= direct
    return [name for name in stages if name in found]


def paths(stages: Mapping[str, Any], name: str, kind: str) -> list[str]:
    """The paths a stage of dvc.yaml names under `deps`, `outs`, `metrics` or `plots`; none for an unknown stage."""
    entries = stages[name].get(kind, []) if name in stages else []
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def report(stage: str, metrics: Mapping[str, float], measured: Mapping[str, float] | None = None) -> None:
    """Write metrics/<stage>.json, print it, and bring the same numbers to MLflow.

    Args: metrics: flat `part/measure` numbers that equal inputs reproduce.
        measured: times, speeds and memory of this very run; they go to runs/ and MLflow only.
    """
    files.write_json(Path("metrics") / f"{stage}.json", dict(metrics))
    globals()["measured"].update(measured or {})
    for name, value in sorted(metrics.items()):
        print(f"  {name:<48} {value:.6g}" if isinstance(value, float) else f"  {name:<48} {value}")
    if _is_open():
        _softly(lambda: _log_reported(stage))


def compared(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of one stage's metrics those that the runs table shows, in the order of COMPARED, at most MAX_OF_A_STAGE.

    Of formats at most MAX_FORMATS.
    """
    names = [name for name in sorted(metrics) if not fnmatch.fnmatch(name, NOT_COMPARED)]
    chosen: dict[str, float] = {}
    for pattern in COMPARED:
        matching = fnmatch.filter(names, pattern)
        most = MAX_FORMATS if pattern.startswith("export/") else MAX_OF_A_STAGE
        chosen |= {name: metrics[name] for name in matching[:most]}
    return dict(list(chosen.items())[:MAX_OF_A_STAGE])


def _log_reported(stage: str) -> None:
    """Attach a stage's metrics and plots, as they lie in the working folder, to the open run."""
    import mlflow

    path = Path("metrics") / f"{stage}.json"
    if not path.exists():
        return
    mlflow.log_metrics(compared(files.read_json(path)))
    mlflow.log_artifact(str(path), "metrics")
    run = mlflow.active_run()
    if stage == "dedup_split" and run is not None:
        log_dataset(run.info.run_id, {path.name: path for path in Path("data/splits").glob("*.parquet")})


def log_dataset(run_id: str, splits: Mapping[str, Path]) -> None:
    """Name the data a run works with by the hashes of its files, unless the run names the same already.

    Args: splits: where the files of data/splits lie, by their names in it.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client = MlflowClient()
    inputs = client.get_run(run_id).inputs
    known = {found.dataset.digest for found in inputs.dataset_inputs} if inputs else set()
    digests = {name: files.sha256(path) for name, path in splits.items()}
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]
    if not splits or digest in known:
        return
    source = json.dumps({"path": "data/splits", "sha256": digests}, sort_keys=True)
    dataset = Dataset("data/splits", digest, "dvc", source)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def steps_per_point(n_steps: int) -> int:
    """Every how many steps a live curve gets a point: the least power of two that keeps it within MAX_POINTS.

    A power of two, because `make sync` fills a curve in by the steps that were done, which early stopping makes fewer
    than were planned: the points it wants then include those that are there.
    """
    return 1 << max(0, math.ceil(math.log2(max(n_steps, 1) / MAX_POINTS)))


def log_step(step: int, values: Mapping[str, float]) -> None:
    """Add points to the live curves in MLflow, at an optimizer step."""
    if _is_open():
        import mlflow

        _softly(lambda: mlflow.log_metrics(dict(values), step=step))


def log_table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows as a table in MLflow, in place of the table of this name; `name` without suffix."""
    if _is_open() and rows:
        _softly(lambda: _replace_table(f"{name}.json", rows))


def _replace_table(file: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """What mlflow.log_table does, which would append to the table of a stage that ran before, or was resumed."""
    import mlflow
    import pandas as pd
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    mlflow.log_text(pd.DataFrame(rows).to_json(orient="split", index=False), file)
    if run := mlflow.active_run():
        tags = mlflow.get_run(run.info.run_id).data.tags
        shown = json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (table := {"path": file, "type": "table"}) not in shown:
            mlflow.set_tag(MLFLOW_LOGGED_ARTIFACTS, json.dumps([*shown, table]))


def log_file(path: Path, folder: str) -> None:
    """Attach a file, for instance a report page or a plot's table."""
    if _is_open():
        import mlflow

        _softly(lambda: mlflow.log_artifact(str(path), folder))


def _log_measured(stage: str) -> None:
    import mlflow

    numbers = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
    mlflow.log_metrics(compared(numbers))
    mlflow.log_dict(dict(measured), f"measured/{stage}.json")


def _write_measured(stage: str, name: str) -> None:
    record = measured | ({"mlflow_lost": _lost[0]} if _lost else {})
    files.write_json(environment.root() / "runs" / name / f"{stage}.json", record)


def ended(name: str) -> dict[str, Any]:
    """How the last stage of an experiment ended here: process, status, tags; empty where none did."""
    path = environment.root() / "runs" / name / ENDED
    return dict(files.read_json(path)) if path.exists() else {}


def _write_ended(name: str, status: str, tags: Mapping[str, str]) -> None:
    """Keep the end of a stage, and of those before it what they made, in case MLflow does not hear of it."""
    made = {tag: value for tag, value in ended(name).get("tags", {}).items() if tag.startswith(("ran.", "md5."))}
    record = {"process": process(), "status": status, "tags": made | dict(tags)}
    files.write_json(environment.root() / "runs" / name / ENDED, record)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
