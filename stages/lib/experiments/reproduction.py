"""An experiment run again from its commit alone: in a clean clone, stage by stage, each output held to its hash.

    commit -> clone -> the user's data -> a stage, run -> its hashes beside the recorded ones -> the next stage ...

Nothing comes from DVC's run cache, and nothing goes into it. The first stage whose outputs are not the recorded ones is
where the two runs part; why follows from its inputs, from what it fetched, or from the machine.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from stages.lib import comparison, config, environment, files, stage, tracking
from stages.lib.errors import ConfigError, DataError
from stages.lib.experiments import kept
from stages.lib.experiments.kept import Experiment
from stages.lib.schema.evaluate import Evaluate

Causes = dict[str, list[str]]
"""Kind -> what is not as recorded, a line each. Kinds: code, parameters, data, base, package, hardware, threads,
arithmetic; unknown: nothing is known that explains it."""

INPUTS = ("code", "parameters", "data", "base")  # with one of these it is another run, whatever its figures
ELSEWHERE = ("DVC_", "MLFLOW_", "PIPELINE_")  # variables that lead out of the clone
PREDICTIONS = Path("reports/evaluation/predictions.parquet")
MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(r"repro-[0-9a-f]{8}")


@dataclass(frozen=True)
class Difference:
    """Where two runs part. outs: path -> files in it that differ, as far as both are here."""

    stage: str
    outs: dict[str, list[str]]
    causes: Causes

    def is_of_inputs(self) -> bool:
        return any(kind in INPUTS for kind in self.causes)


@dataclass
class Reproduction:
    """What came of it. stages: that were run; restored: those that could not be, and why; failed: the one it ended at,
    and why; environment: what differs of it; first: the first difference that remains, or, where none does, the last
    that a stage lost on the recorded number of threads; threads: that number, then; metrics: `stage/key` -> recorded
    and found, where they differ; figures: predictions compared, where the first difference acts on them.
    """

    folder: Path
    stages: list[str] = field(default_factory=list)
    restored: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    environment: Causes = field(default_factory=dict)
    first: Difference | None = None
    threads: str | None = None
    metrics: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    figures: list[comparison.Line] = field(default_factory=list)

    def is_exact(self) -> bool:
        return not self.failed and (self.first is None or self.threads is not None)

    def verdict(self) -> str:
        if self.failed:
            return f"not reproduced: {', '.join(self.failed)} failed"
        if self.first is None:
            return "reproduced bit for bit"
        if self.threads:
            return f"reproduced bit for bit with the recorded threads ({self.threads})"
        told = {line.verdict("theirs") for line in self.figures}
        if not self.first.is_of_inputs() and told == {"cannot tell"}:
            return "reproduced within noise"
        return f"not reproduced: differs first in {self.first.stage} ({', '.join(self.first.causes)})"


@dataclass
class Params:
    """The section of params.yaml that says how predictions are compared."""

    evaluate: Evaluate


def locate(run: str) -> Experiment:
    """The experiment of a name, a commit, or an MLflow run; fetched from the git remotes when only they have it.

    Raises: ConfigError, for what none of them knows.
    """
    name = of_mlflow(run) if MLFLOW_ID.fullmatch(run) else run
    if KEY.fullmatch(name):
        revision = commit_of(name)
        return kept.read(name, revision, revision)
    if name not in kept.references():
        fetch(name)
    return kept.find(name)


def of_mlflow(run_id: str) -> str:
    """The experiment whose MLflow run this is."""
    import mlflow

    uri = tracking.address(config.values()["runtime"]["tracking_uri"])
    try:
        return str(tracking.client(uri).get_run(run_id).data.tags["dvc.exp_name"])
    except (mlflow.MlflowException, KeyError) as fault:
        raise ConfigError(
            f"MLflow at {uri}: found no run {run_id} of an experiment ({str(fault).splitlines()[0]}). Expected an id "
            "it shows, or the experiment's name; MLFLOW_TRACKING_URI or runtime.tracking_uri name another server."
        ) from fault


def fetch(name: str) -> None:
    """Bring an experiment's commit here from the git remotes that have it."""
    for remote in _git("remote").split():
        for line in _git("ls-remote", remote, f"refs/exps/*/*/{name}").splitlines():
            ref = line.split()[1]
            _git("fetch", "--quiet", remote, f"{ref}:{ref}")


def commit_of(key: str) -> str:
    """The latest commit that recorded the results of a plain `dvc repro`, found by what names such a run.

    Raises: ConfigError, when no branch has a commit with its parameters, code and data.
    """
    for revision in _git("rev-list", "--branches", "--remotes", "--tags", "HEAD", "--", "dvc.lock").split():
        archive = subprocess.run(["git", "archive", revision], capture_output=True, check=True).stdout
        with TemporaryDirectory() as scratch, tarfile.open(fileobj=BytesIO(archive)) as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 before .4 has none
            packed.extractall(scratch)
            folder = Path(scratch)
            with suppress(KeyError):  # of a parameter that is younger than this commit
                if tracking.key(yaml.safe_load((folder / "params.yaml").read_text()), folder) == key:
                    return revision
    raise ConfigError(
        f"experiment: found {key}, a plain `dvc repro`, but no commit of a branch or tag with its parameters, code and "
        "data, and a dvc.lock. Expected one: commit before, and dvc.lock after a run, or name an experiment."
    )


def reproduce(
    experiment: Experiment, folder: Path, *, until: str | None = None, say: Callable[[str], None] = print
) -> Reproduction:
    """Run an experiment's stages again and compare; stop where the inputs are others.

    Args: folder: an absent one, for the clone. until: the last stage; None for all the experiment has. say: told a line
        after each stage.
    Raises: ConfigError, when the experiment has no such stage. DataError, when its data cannot be had.
    """
    clone(experiment, folder)
    recorded, names = _lock(folder), chosen(experiment, until, folder)
    (folder / "dvc.lock").unlink()
    bring_data(folder)
    made = {out["path"] for entry in recorded.values() for out in entry["outs"]}
    known = described(_run_name(experiment, folder))
    found = Reproduction(folder)
    for name in names:
        began = time.monotonic()
        failure = run(folder, name, found.threads)
        if failure and name in fetching(experiment) and restore(folder, name, recorded[name]):
            found.restored[name] = failure
            say(f"{name}: could not be run here ({failure}); its recorded outputs were restored")
            continue
        found.stages.append(name)
        if failure:
            found.failed[name] = failure
            say(f"{name}: failed")
            break
        here = _described(folder / "runs", name)
        machine = environment_between(known.get(name) or next(iter(known.values()), None), here)
        found.environment |= machine
        if (differing := changed(recorded[name], _lock(folder)[name])) and (found.first is None or found.threads):
            causes = why(name, recorded[name], _lock(folder)[name], made, fetching(experiment), machine)
            outs = {path: changed_files(md5, folder / path) for path, md5 in differing.items()}
            found.first, found.threads = Difference(name, outs, causes), None
            threads = (known.get(name) or {}).get("threads", {}).get("threads")
            if "threads" in causes and threads and agrees_with(threads, folder, name, recorded[name]):
                found.threads = threads
                found.first = Difference(name, outs, {"threads": causes["threads"]})
        found.metrics |= metrics_between(name, experiment.metrics.get(name, {}), folder)
        state = f"{len(differing)} of {len(recorded[name]['outs'])} outputs differ" if differing else "as recorded"
        say(f"{name}: {state}, {time.monotonic() - began:.0f} s")
        if found.first and found.first.is_of_inputs():
            break
    if found.first and not found.threads:
        acted_on = found.stages[found.stages.index(found.first.stage) :]
        if "evaluate" in acted_on and (folder / PREDICTIONS).exists():
            found.figures = figures(experiment, folder, recorded)
    return found


def chosen(experiment: Experiment, until: str | None, folder: Path) -> list[str]:
    """The stages to run, in their order."""
    if until is None and experiment.stages:
        return list(experiment.stages)
    if until not in experiment.stages:
        raise ConfigError(
            f"{experiment.name}: found no results of {until or 'any stage'} that belong to its parameters in the "
            f"dvc.lock of {experiment.revision[:12]}, expected some; it has {', '.join(experiment.stages) or 'none'}."
        )
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    before = tracking.upstream(until, pipeline)
    return [name for name in experiment.stages if name in (*before, until)]


def clone(experiment: Experiment, folder: Path) -> None:
    """A repository of its own at the experiment's commit, with this one's DVC remotes and cached files.

    It tracks into itself: a repeat is no new row of anybody's MLflow.
    """
    from dvc.config import Config

    folder.parent.mkdir(parents=True, exist_ok=True)
    root = environment.root()
    for command in (
        ["git", "clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder)],
        ["git", "-C", str(folder), "checkout", "--quiet", "--detach", experiment.revision],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"{' '.join(command)}: {done.stderr.strip()}")
    ours = Config(str(root / ".dvc"))
    (folder / ".dvc/config.local").touch(mode=0o600)  # a remote's entry may hold what opens it
    with Config(str(folder / ".dvc")).edit("local") as local:
        local["remote"] = dict(ours["remote"])
        local["cache"] = {"dir": ours["cache"].get("dir") or str(root / ".dvc/cache")}
        if remote := ours["core"].get("remote"):
            local["core"] = {"remote": remote}
    set_runtime(folder, tracking_uri=None)


def set_runtime(folder: Path, **values: Any) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["runtime"] |= values
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def bring_data(folder: Path) -> None:
    """Bring the user's own data into the clone: what .dvc files name, from the cache or from a DVC remote.

    Raises: DataError, when neither has it.
    """
    named = _git("-C", str(folder), "ls-files", "-z", "*.dvc").split("\0")[:-1]  # else it quotes names like données
    if named and dvc(folder, "checkout", *named) and dvc(folder, "pull", *named):
        raise DataError(
            f"{', '.join(named)}: neither DVC's cache nor a DVC remote has what they name, expected one of them. "
            f"`dvc remote add` names one, `dvc push` on the machine that has the data fills it. Log: {log(folder)}"
        )


def restore(folder: Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Bring a stage's recorded outputs into the clone in place of running it; whether that worked."""
    lock = {"schema": "2.0", "stages": {**_lock(folder), name: dict(entry)}}
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    for path in (out["path"] for out in entry["outs"] if out["path"].startswith("metrics/")):
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", "--", path], check=False)
    return dvc(folder, "checkout", name) == 0 or dvc(folder, "pull", name) == 0


def run(folder: Path, name: str, threads: str | None = None) -> str:
    """Run one stage in the clone; why it failed, empty where it did not."""
    if threads:
        set_runtime(folder, threads=int(threads))
    started = log(folder).stat().st_size if log(folder).exists() else 0
    if not dvc(folder, "repro", "--single-item", "--force", "--no-run-cache", "--no-commit", name):
        return ""
    with log(folder).open(errors="replace") as said:
        said.seek(started)
        lines = [line.strip() for line in said if line.strip()]
    ours = [line for line in lines if line.startswith(f"{name}: ")]
    return (ours or lines or [f"no word, see {log(folder)}"])[-1]


def dvc(folder: Path, *arguments: str) -> int:
    """Run DVC in the clone, with this environment's python; its exit status. What it says goes to the log."""
    named = {name: value for name, value in os.environ.items() if not name.startswith(ELSEWHERE)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log(folder).open("a") as said:
        return subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=named | {"PATH": path, "PIPELINE_ENV": sys.prefix},
            check=False,
        ).returncode


def log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def fetching(experiment: Experiment) -> list[str]:
    """The stages that read from outside of the repository, so that equal inputs do not promise equal bytes."""
    data = experiment.params["data"]
    sources = {data["source"], *(entry.get("source", data["source"]) for entry in data["sources"].values())}
    return ["base_model", *(["prepare"] if sources & {"hub", "url"} else [])]


def changed(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """Path -> recorded hash of the outputs of one stage that came out otherwise. Both: its entry of a dvc.lock."""
    here = {out["path"]: out["md5"] for out in found["outs"]}
    return {out["path"]: out["md5"] for out in recorded["outs"] if out["md5"] != here.get(out["path"])}


def why(
    name: str,
    recorded: Mapping[str, Any],
    found: Mapping[str, Any],
    made: set[str],
    fetching: Sequence[str],
    machine: Causes,
) -> Causes:
    """What explains that a stage gave other bytes: its inputs; where these are equal what it fetched and the machine.

    Args: recorded, found: the stage's entries of two dvc.lock. made: paths that stages write. machine: what differs of
        the environment.
    """
    causes = inputs_between(recorded, found, made)
    if any(kind in INPUTS for kind in causes):
        return causes
    if name in fetching:
        kind = "base" if name == "base_model" else "data"
        causes[kind] = [f"{name} fetches from outside, and what it got is not what was recorded"]
    for kind, lines in machine.items():
        causes.setdefault(kind, []).extend(lines)
    return causes or {"unknown": ["no input and nothing of the environment differs: the stage does not repeat itself"]}


def inputs_between(recorded: Mapping[str, Any], found: Mapping[str, Any], made: set[str]) -> Causes:
    """What of a stage's inputs differs, by kind; outputs of other stages count as data."""
    causes: Causes = {}
    if recorded["cmd"] != found["cmd"]:
        causes["code"] = [f"command: {recorded['cmd']} when recorded, {found['cmd']} here"]
    before, after = ({dep["path"]: dep["md5"] for dep in entry.get("deps", [])} for entry in (recorded, found))
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            state = "is new here" if path not in before else "is gone here" if path not in after else "is another"
            causes.setdefault(_kind(path, made), []).append(f"{path} {state}")
    left, right = (config.flat(entry.get("params", {}).get("params.yaml", {})) for entry in (recorded, found))
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            line = f"{key}: {left.get(key)} when recorded, {right.get(key)} here"
            causes.setdefault("parameters", []).append(line)
    return causes


def _kind(path: str, made: set[str]) -> str:
    if path == "requirements.lock":
        return "package"
    return "code" if path not in made and path.startswith(("stages/", "conf/")) else "data"


def environment_between(recorded: environment.Description | None, here: environment.Description) -> Causes:
    """What differs of the environment; of an unrecorded one no more is known than what the lock says."""
    if recorded is not None:
        return environment.differences(recorded, here)
    unlocked = environment.unlocked(here)
    unknown = "the environment of the recorded run is not known here: hardware and threads may differ"
    return ({"package": unlocked} if unlocked else {}) | {"unknown": [unknown]}


def described(name: str) -> dict[str, environment.Description]:
    """Stage -> the environment it was run in, of the stages that were run under an experiment's name.

    From runs/ of this repository, or, where that has nothing, from MLflow.
    """
    folder = environment.root() / "runs" / name
    records = {path.stem: files.read_json(path) for path in sorted(folder.glob("*.json"))} or _measured(name)
    return {name: record["environment"] for name, record in records.items() if "environment" in record}


def _measured(name: str) -> dict[str, dict[str, Any]]:
    import mlflow

    uri = tracking.address(config.values()["runtime"]["tracking_uri"])
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return {}
    try:
        client = tracking.client(uri)
        mlflow.set_tracking_uri(uri)
        known = client.get_experiment_by_name(tracking.EXPERIMENT)
        found = client.search_runs([known.experiment_id], tracking.named(name)) if known else []
        attached = [file.path for one in found for file in client.list_artifacts(one.info.run_id, "measured")]
        place = found[0].info.artifact_uri if found else ""
        return {Path(path).stem: mlflow.artifacts.load_dict(f"{place}/{path}") for path in attached}
    except (mlflow.MlflowException, OSError):
        return {}


def _described(runs: Path, name: str) -> environment.Description:
    """The environment of a stage that was just run in the clone; of code that does not record it, this process's."""
    for path in runs.glob(f"*/{name}.json"):
        record = files.read_json(path)
        if "environment" in record:
            return dict(record["environment"])
    return environment.describe(runs.parent / "requirements.lock")


def _run_name(experiment: Experiment, folder: Path) -> str:
    """The name an experiment's stages were run under: DVC's, or for a commit that of a plain `dvc repro`."""
    if experiment.name in kept.references():
        return experiment.name
    return tracking.key(yaml.safe_load((folder / "params.yaml").read_text()), folder)


def agrees_with(threads: str, folder: Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a stage gives the recorded bytes on the recorded number of threads. Its outputs are then these."""
    return run(folder, name, threads) == "" and not changed(entry, _lock(folder)[name])


def changed_files(md5: str, place: Path) -> list[str]:
    """The files of an output that are not as recorded; none where the recorded list of them is not in DVC's cache."""
    cached = stage.cached(md5)
    recorded = {path: f"{file.parent.name}{file.name}" for path, file in cached.items() if path != "."}
    if not recorded:
        return []
    here = {str(file.relative_to(place)): _md5(file) for file in place.rglob("*") if file.is_file()}
    return sorted(path for path in recorded.keys() | here.keys() if recorded.get(path) != here.get(path))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def metrics_between(
    name: str, recorded: Mapping[str, float], folder: Path
) -> dict[str, tuple[float | None, float | None]]:
    """`stage/key` -> recorded and found, for the metrics of a stage that are not equal."""
    path = folder / f"metrics/{name}.json"
    here = files.read_json(path) if path.exists() else {}
    keys = sorted(recorded.keys() | here.keys())
    return {f"{name}/{key}": (recorded.get(key), here.get(key)) for key in keys if recorded.get(key) != here.get(key)}


def figures(experiment: Experiment, folder: Path, recorded: Mapping[str, Any]) -> list[comparison.Line]:
    """The tuned model's answers of this run beside the recorded ones, row by row; nothing where those cannot be had."""
    out = str(PREDICTIONS.parent)
    if out not in experiment.outs:
        return []
    if not stage.cached(experiment.outs[out]):
        found = (folder / "dvc.lock").read_text()
        (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": dict(recorded)}))
        dvc(folder, "fetch", out)
        (folder / "dvc.lock").write_text(found)
    cached = stage.cached(experiment.outs[out]).get(PREDICTIONS.name)
    if cached is None:
        return []
    p = config.load(Params, path=folder / "params.yaml")
    return comparison.between(files.read_rows(folder / PREDICTIONS), files.read_rows(cached), p.evaluate)


def report(found: Reproduction) -> list[str]:
    """What a person reads at the end, the verdict last."""
    lines = []
    if found.environment:
        lines.append("environment, where it differs:")
        lines += [f"  {kind}: {line}" for kind, entries in found.environment.items() for line in entries]
    else:
        lines.append("environment: as recorded")
    if found.first:
        lines.append(f"first difference: {found.first.stage}")
        for path, inside in found.first.outs.items():
            more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
            lines.append(f"  {path}{': ' if inside else ''}{', '.join(inside[:3])}{more}")
        lines += [f"  why, {kind}: {line}" for kind, entries in found.first.causes.items() for line in entries]
    if found.metrics:
        lines.append(f"metrics that differ: {len(found.metrics)}")
        lines += [f"  {key}: {before} when recorded, {after} here" for key, (before, after) in _worst(found.metrics)]
    for line in found.figures:
        difference = line.against["theirs"]
        lines.append(
            f"  {line.task} {line.measure}: {difference.delta:+.4g} ({difference.low:+.4g} to {difference.high:+.4g}, "
            f"{difference.n} rows): {line.verdict('theirs')}"
        )
    lines += [f"{name}: restored, not run; nothing is proven about it" for name in found.restored]
    lines += [f"{name} failed: {reason}" for name, reason in found.failed.items()]
    return [*lines, f"{found.verdict()} ({len(found.stages)} stages: {', '.join(found.stages)})"]


def _worst(
    metrics: Mapping[str, tuple[float | None, float | None]],
) -> list[tuple[str, tuple[float | None, float | None]]]:
    """The five that moved the most, relative to what was recorded; those that only one side has come first."""

    def moved(pair: tuple[float | None, float | None]) -> float:
        before, after = pair
        return float("inf") if before is None or after is None else abs(after - before) / (abs(before) or 1.0)

    return sorted(metrics.items(), key=lambda item: -moved(item[1]))[:5]


def remove(folder: Path) -> None:
    """Delete a clone, whose cached files are read-only, and its log."""
    shutil.rmtree(folder, ignore_errors=True)
    log(folder).unlink(missing_ok=True)


def _lock(folder: Path) -> dict[str, Any]:
    path = folder / "dvc.lock"
    return dict(kept.parse(path.read_text())["stages"]) if path.exists() else {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout
