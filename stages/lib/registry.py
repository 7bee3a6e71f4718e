"""MLflow's model registry: versions of a model, of which one is the champion, and who may take its place.

    a promoted export  ->  a version, alias `candidate`  ->  the gate says better  ->  alias `champion`

What the gate needs of a version later, its predictions, lies among the artifacts of the run that made it.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib import comparison, files, tracking
from stages.lib.comparison import BASELINES, TUNED, Line, Prediction
from stages.lib.export import manifest
from stages.lib.schema.evaluate import Evaluate

CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST = "manifest.sha256"  # the tag by which a version is found again
PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True)
class Judgement:
    """`better`, `worse` or `cannot tell`; one line for each figure that says so."""

    word: str
    lines: list[str] = field(default_factory=list)


def judge(ours: Sequence[Prediction], champion: Sequence[Prediction] | None, name: str, p: Evaluate) -> Judgement:
    """Whether a model may become champion: better than the present one, or, where there is none, than both baselines.

    Better is better on the main measure of one task at least and worse on none, as comparison.Difference.verdict says:
    by the paired bootstrap's interval and the corrected sign test. Without a champion that must hold against the base
    and against the base with examples. Other test rows than the champion's, or other measures, tell nothing.

    Args: ours, champion: rows of predictions.parquet. name: of the champion, for the lines.
    """
    if champion is None:
        lines = comparison.compare(ours, p)
        told = {baseline: _against(baseline, baseline, lines) for baseline in BASELINES}
        words = [one.word for one in told.values()]
        word = "worse" if "worse" in words else "better" if set(words) == {"better"} else "cannot tell"
        return Judgement(word, [line for one in told.values() for line in one.lines])
    rows = [{(row["task"], row["id"]) for row in table if row["arm"] == TUNED} for table in (ours, champion)]
    if rows[0] != rows[1]:
        shared = len(rows[0] & rows[1])
        return Judgement(
            "cannot tell",
            [f"{len(rows[0])} test rows, {name} has {len(rows[1])}, of which {shared} are the same: not one test set"],
        )
    if ours[0].keys() != champion[0].keys():
        return Judgement("cannot tell", [f"{name} was scored by other measures: evaluate it again"])
    return _against("theirs", name, comparison.between(ours, champion, p))


def _against(arm: str, name: str, lines: Sequence[Line]) -> Judgement:
    """What the main measures of all tasks say together of one opponent."""
    mains = [comparison.main_measure(lines, task) for task in sorted({line.task for line in lines})]
    words = {line.verdict(arm) for line in mains if arm in line.against}
    word = "worse" if "worse" in words else "better" if "better" in words else "cannot tell"
    shown = []
    for line in mains:
        if arm in line.against:
            found = line.against[arm]
            figures = f"{line.task}, {line.measure}: {_ours(line):.3f} against {line.arms[arm]:.3f} of {name}"
            shown.append(
                f"{figures}, {found.delta:+.3f} ({found.low:+.3f} to {found.high:+.3f}, {found.n} rows): "
                f"{line.verdict(arm)}"
            )
    return Judgement(word, shown)


def _ours(line: Line) -> float:
    return line.arms["ours"] if "ours" in line.arms else line.arms[TUNED]


def find_run(name: str, experiment_id: str) -> Any:
    """The MLflow run of an experiment; None where there is none."""
    from mlflow import MlflowClient

    found = MlflowClient().search_runs([experiment_id], tracking.named(name), max_results=1)
    return found[0] if found else None


def versions(name: str) -> dict[str, Any]:
    """The versions of a model by the hash of the manifest they were promoted with; {} for an unknown model."""
    from mlflow import MlflowClient

    found = MlflowClient().search_model_versions(f"name = '{name}'")
    return {version.tags[DIGEST]: version for version in found if DIGEST in version.tags}


def champion(name: str) -> Any:
    """The version that is champion; None where no version is."""
    from mlflow import MlflowClient

    models = MlflowClient().search_registered_models(f"name = '{name}'")
    aliases = models[0].aliases if models else {}
    return MlflowClient().get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None


def predictions(version: Any) -> list[Prediction] | None:
    """The predictions a version was promoted with; None where they are gone, or it was not promoted by us."""
    import mlflow

    if DIGEST not in version.tags:
        return None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # over one small file
    path = f"{_folder(version.tags[DIGEST])}/{PREDICTIONS}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path=path, dst_path=scratch)
        except (mlflow.MlflowException, OSError):
            return None
        return list(files.read_rows(Path(found)))


def register(name: str, copy: Path, evaluated: Path, run: Any) -> Any:
    """A new version of a model, made from a promoted copy.

    Manifest, card and predictions go to the run's artifacts first, so that no version is without them. A server takes
    no path of this machine as a source, so the version's source is those artifacts there, and the copy itself here.

    Args: copy: a folder as manifest.copy leaves it. evaluated: predictions.parquet. run: that made the model.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    client = MlflowClient()
    held = manifest.read(copy)
    origin = held["promoted"]
    digest = origin["manifest_sha256"]
    tags = {
        DIGEST: digest,
        "adapter.sha256": held["adapter"]["adapter_model.safetensors"],
        "git.commit": origin["commit"],
        "dvc.exp_name": origin["experiment"],
        "folder": str(copy.resolve()),
    }
    tags |= {"is_dirty": "true"} if origin["is_dirty"] else {}
    for file in (copy / manifest.NAME, copy / "README.md", evaluated):
        client.log_artifact(run.info.run_id, str(file), _folder(digest))
    is_local = mlflow.get_registry_uri().startswith("sqlite:")
    source = copy.resolve().as_uri() if is_local else f"{run.info.artifact_uri}/{_folder(digest)}"
    try:
        client.create_registered_model(name)
    except mlflow.MlflowException as fault:
        if fault.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return client.create_model_version(name, source, run.info.run_id, tags)


def tell(name: str, version: Any, told: Judgement) -> None:
    """Make a version the candidate, write the judgement on it, and make it champion where that is deserved."""
    from mlflow import MlflowClient

    client = MlflowClient()
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    client.update_model_version(name, version.version, description="\n\n".join([told.word, *told.lines]))
    client.set_model_version_tag(name, version.version, "gate", told.word)
    if told.word == "better":
        client.set_registered_model_alias(name, CHAMPION, version.version)
        client.delete_registered_model_alias(name, CANDIDATE)


def _folder(digest: str) -> str:
    return f"promoted/{digest[:12]}"
