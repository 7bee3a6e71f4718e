"""What experiments scored on each test row, put together: settings, each with its trainings of several seeds.

experiments of one sweep.id  ->  settings {lora.r: 8, ...} with {seed: experiment}  ->  scores (seeds, rows)
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stages.lib import comparison, config, environment, files, tracking
from stages.lib.bootstrap import Numbers
from stages.lib.errors import ConfigError, DataError, Pruned
from stages.lib.experiments import kept
from stages.lib.experiments.kept import Experiment
from stages.lib.measures import SCORES

SEED = "seed"
EVALUATION = "reports/evaluation"
PREDICTIONS = "predictions.parquet"
COLUMNS = ("arm", "id", "task", "n_tokens", "nll", "stops", *SCORES)
EQUAL_DATA = ("data/packed", "models/base")  # what several seeds of one setting have in common

Scored = Mapping[tuple[str, str], Mapping[str, Any]]
"""The tuned model's scores by task and id of the test row."""


@dataclass(frozen=True)
class Setting:
    """Equal parameters; trainings by seed. values: of all tracked parameters but the seed, flat."""

    values: dict[str, Any]
    trainings: dict[int, Experiment]

    @property
    def any(self) -> Experiment:
        return next(iter(self.trainings.values()))

    @property
    def rows(self) -> float:
        """To train on."""
        return self.any.metrics["dedup_split"]["rows/train"]


@dataclass(frozen=True)
class Measure:
    """One figure of one task, by its name in comparison.PREDICTIONS, or `loss`."""

    task: str
    name: str

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"

    @property
    def higher_is_better(self) -> bool:
        return self.name not in comparison.LOWER_IS_BETTER


def tracked(experiment: Experiment) -> dict[str, Any]:
    """Flat parameters that can change a result, without the seed."""
    sections = {key: value for key, value in experiment.params.items() if key not in tracking.UNTRACKED}
    return {key: value for key, value in config.flat(sections).items() if key != SEED}


def settings(experiments: Sequence[Experiment]) -> list[Setting]:
    """Experiments with equal tracked parameters as one setting; of two with one seed, too, the later one counts.

    Args: experiments: earliest first.
    """
    found: dict[str, Setting] = {}
    for experiment in experiments:
        values = tracked(experiment)
        setting = found.setdefault(json.dumps(values, sort_keys=True), Setting(values, {}))
        setting.trainings.pop(experiment.params[SEED], None)
        setting.trainings[experiment.params[SEED]] = experiment
    ordered = [Setting(each.values, dict(sorted(each.trainings.items()))) for each in found.values()]
    return sorted(ordered, key=lambda each: each.any.name)


def alike(experiment: Experiment, experiments: Sequence[Experiment]) -> Setting:
    """An experiment with those that differ in the seed alone: equal parameters, data, base and code of the stages."""
    code = _code(experiment)
    same = [
        other
        for other in experiments
        if other.revision != experiment.revision
        and other.params.get(SEED) != experiment.params[SEED]
        and EVALUATION in other.outs
        and tracked(other) == tracked(experiment)
        and all(other.outs.get(out) == experiment.outs.get(out) for out in EQUAL_DATA)
        and _code(other) == code
    ]
    return settings([*same, experiment])[0]


def _code(experiment: Experiment) -> dict[str, str]:
    """Hashes of the modules that trained and evaluated, from dvc.lock."""
    lock = kept.parse(experiment.read("dvc.lock") or "{}").get("stages", {})
    deps = [dep for stage in ("qlora_train", "evaluate") for dep in lock.get(stage, {}).get("deps", [])]
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith("stages/")}


def scored(experiment: Experiment) -> dict[tuple[str, str], dict[str, Any]]:
    """The tuned model's scores by task and row.

    Raises: DataError, when the experiment was not evaluated, or DVC's cache lacks the predictions.
    """
    path = kept.files(experiment, EVALUATION)[PREDICTIONS]
    rows = pq.read_table(path, columns=list(COLUMNS), filters=[("arm", "=", comparison.TUNED)]).to_pylist()
    return {(row["task"], row["id"]): row for row in rows}


def measures(tables: Sequence[Scored]) -> list[Measure]:
    """What every training was measured by, task by task: first what judges the task, then the loss, then the rest.

    Raises: DataError, when they have no test row in common.
    """
    shared = _shared(tables)
    found = []
    for task in sorted({task for task, _ in shared}):
        rows = [tables[0][key] for key in shared if key[0] == task]
        names = [name for name in (*SCORES, "stops") if all(row[name] is not None for row in rows)]
        main = comparison.main_of(names)
        found += [Measure(task, name) for name in (main, "loss", *(name for name in names if name != main))]
    return found


def choose(found: Sequence[Measure], asked: str | None, tables: Sequence[Scored]) -> Measure:
    """The measure that was asked for as task/measure, or what judges the task with most rows.

    Raises: ConfigError, listing what there is.
    """
    if asked is None:
        keys = _shared(tables)
        return max(found, key=lambda each: (sum(task == each.task for task, _ in keys), -found.index(each)))
    if asked not in map(str, found):
        raise ConfigError(f"metric: found {asked!r}, expected one of {', '.join(map(str, found))}.")
    return next(each for each in found if str(each) == asked)


def scores(by_setting: Sequence[Sequence[Scored]], measure: Measure) -> tuple[list[Numbers], Numbers]:
    """Scores of each setting, (its seeds, rows), and weights of the rows: tokens for the loss, else ones.

    Args: by_setting: tables of each setting's trainings.
    """
    keys = [key for key in _shared([table for tables in by_setting for table in tables]) if key[0] == measure.task]
    first = by_setting[0][0]
    is_loss = measure.name == "loss"

    def number(row: Mapping[str, Any]) -> float:
        return float(row["nll"] / row["n_tokens"] if is_loss else row[measure.name])

    found = [np.array([[number(table[key]) for key in keys] for table in tables]) for tables in by_setting]
    return found, np.array([first[key]["n_tokens"] if is_loss else 1.0 for key in keys], np.float64)


def _shared(tables: Sequence[Scored]) -> list[tuple[str, str]]:
    """Test rows that all trainings answered, sorted."""
    keys = sorted(set(tables[0]).intersection(*tables[1:]))
    if not keys:
        raise DataError(
            f"predictions of {len(tables)} experiments: no test row in common, expected the same test set. "
            "Compare experiments with equal data, split.seed, split fractions and split.max_rows.test."
        )
    return keys


@dataclass(frozen=True)
class Cost:
    """Of one training. flop: 4 for each frozen weight and token, 6 for each trained one, attention left out.
    seconds: of training and evaluation on the machine they ran on, on the average of those known; None: of none."""

    tokens: float
    trainable: float
    flop: float
    seconds: float | None


def cost(setting: Setting) -> Cost:
    """What a setting costs, from its metrics, and from runs/ where it ran here."""
    trained = setting.any.metrics["qlora_train"]
    tokens, trainable = trained["train/tokens"], trained["adapter/trainable_parameters"]
    weights = setting.any.metrics["base_model"]["model/parameters"]
    is_full = setting.values.get("lora.method") == "full"
    walls = [each for each in map(_seconds, setting.trainings.values()) if each is not None]
    return Cost(
        tokens,
        trainable,
        tokens * (4 * (weights - trainable if is_full else weights) + 6 * trainable),
        sum(walls) / len(walls) if walls else None,
    )


def _seconds(experiment: Experiment) -> float | None:
    paths = [environment.root() / "runs" / experiment.name / f"{stage}.json" for stage in ("qlora_train", "evaluate")]
    if not all(path.is_file() for path in paths):
        return None
    return float(sum(files.read_json(path).get("wall_s", 0.0) for path in paths))


@dataclass(frozen=True)
class Absent:
    """A point that was begun and that DVC has no experiment of.

    status: running, pruned, failed or killed; removed, where DVC had one; unfinished, where only its log is known.
    """

    name: str
    status: str
    reason: str


@dataclass(frozen=True)
class Counts:
    """Points of a sweep. done: DVC's experiments. analysed: those in the report; superseded: run again since, by later
    code or data; unevaluated: without predictions. planned: of the sweep's file, None where there is none.
    in_mlflow: rows of done points; None where MLflow could not be asked."""

    done: int
    analysed: int
    superseded: list[str]
    unevaluated: list[str]
    absent: list[Absent]
    planned: int | None
    in_mlflow: int | None

    def of(self, *statuses: str) -> list[Absent]:
        return [each for each in self.absent if each.status in statuses]

    @property
    def failures(self) -> list[Absent]:
        return [each for each in self.absent if each.status not in ("running", "pruned")]


def of_sweep(sweep_id: str) -> list[Experiment]:
    """The experiments of a sweep, earliest first.

    Raises: ConfigError, naming the sweeps there are.
    """
    every = {each.name: each for each in kept.every()}
    by_time = [every[name] for name in kept.references() if name in every]  # a sweep that runs may add some meanwhile
    ids = {each.name: (each.params.get("sweep") or {}).get("id") for each in by_time}
    found = [each for each in by_time if ids[each.name] == sweep_id]
    if not found:
        known = ", ".join(sorted({str(id) for id in ids.values() if id})) or "none"
        raise ConfigError(
            f"sweep: found no experiment with sweep.id={sweep_id}, expected one of: {known}. Run `make sweep "
            f"SWEEP={sweep_id}`, or `dvc exp run --queue -S sweep.id={sweep_id} ...`."
        )
    return found


def absent(
    done: Collection[str],
    at_work: Collection[str],
    ended: Sequence[Mapping[str, Any]],
    rows: Mapping[str, tuple[str, str]],
    logs: Mapping[str, str],
) -> list[Absent]:
    """Points that were begun and that DVC has no experiment of, by name; without those whose values another one has.

    Args: done: names of experiments. at_work: of points that run here. ended: as `running.outcomes`. rows: status and
        reason by name, of MLflow. logs: last line of each point's log.
    """
    outcomes = {each["name"]: each for each in ended}
    repeated = [each["values"] for name, each in outcomes.items() if name in {*done, *at_work}]
    outlived = {name for name, each in outcomes.items() if each["values"] in repeated}
    found = []
    for name in sorted({*at_work, *outcomes, *rows, *logs} - set(done)):
        status, reason = rows.get(name, ("", ""))
        if name in at_work:
            found.append(Absent(name, "running", logs.get(name, "")))
        elif name in outlived:
            continue  # under other code or data it has another name
        elif name in outcomes:
            status, reason = outcomes[name]["status"], outcomes[name]["reason"]
            found.append(Absent(name, "removed" if status == "done" else status, reason))
        elif status in ("RUNNING", "FAILED", "KILLED"):
            is_pruned = reason.startswith(f"{Pruned.__name__}: ")
            found.append(Absent(name, "pruned" if is_pruned else status.lower(), reason or logs.get(name, "")))
        else:
            found.append(Absent(name, "unfinished", logs.get(name, "")))
    return found


def mixed(experiments: Sequence[Experiment]) -> list[str]:
    """Files that no stage makes and of which a stage read other contents in one experiment than in another."""
    seen: dict[tuple[str, str], set[str]] = {}
    for experiment in experiments:
        lock = kept.parse(experiment.read("dvc.lock") or "{}").get("stages", {})
        made = {out["path"] for stage in lock.values() for out in stage.get("outs", [])}
        for stage in experiment.stages:  # of the others the lock holds what an earlier run read
            for dep in (dep for dep in lock[stage].get("deps", []) if dep["path"] not in made):
                seen.setdefault((stage, dep["path"]), set()).add(dep["md5"])
    return sorted({path for (_, path), contents in seen.items() if len(contents) > 1})


def mlflow_rows(sweep_id: str, uri: str) -> dict[str, tuple[str, str]] | None:
    """Status and reason of every row of a sweep in MLflow, by experiment; None where it has no store or is away."""
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None  # asking would make it
    from mlflow import MlflowException

    try:
        client = tracking.client(uri)
        experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
        asked = f"tags.sweep_id = '{sweep_id}'"
        found = client.search_runs([experiment.experiment_id], asked, max_results=50_000) if experiment else []
    except MlflowException:
        return None
    return {
        run.data.tags.get("dvc.exp_name", run.info.run_name): (run.info.status, run.data.tags.get("failure", ""))
        for run in found
    }
