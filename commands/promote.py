"""make promote: copy the export out, register it in MLflow as a candidate, and let the evaluation decide on champion.

    python -m commands.promote [--exp NAME] [--name MODEL] [--to FOLDER] [--allow-dirty]

The copy lies in promoted/<model>/<first digits of the manifest's sha256>; its manifest also names commit, experiment
and MLflow run, so that whoever holds it can run it again. Promoting the same export again makes no second version.
Exit 0: it is the champion; 1: it stays candidate, since the evaluation does not say better; 2: it cannot be promoted.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.lib import config, files, registry, tracking
from stages.lib.errors import DataError, ExternalError, PipelineError
from stages.lib.experiments import kept
from stages.lib.export import manifest
from stages.lib.schema.evaluate import Evaluate

EXPORT, ADAPTER = Path("models/export"), Path("models/adapter")
PREDICTIONS = Path("reports/evaluation") / registry.PREDICTIONS
PROMOTED = Path("promoted")
READ_BY_STAGES = ("stages/", "conf/", "data/", "hydra_plugins/")  # an untracked file elsewhere changes no result


@dataclass
class Params:
    """The section of params.yaml that says how two models are compared."""

    evaluate: Evaluate


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="promote", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("--exp", help="the experiment that made the export, where it cannot be found out")
    known.add_argument("--name", help="of the model in the registry; by default that of the base with -tuned")
    known.add_argument("--to", type=Path, help="an absent or empty folder for the copy, instead of promoted/")
    known.add_argument("--allow-dirty", action="store_true", help="although no commit makes this export")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    import mlflow

    try:
        return promote(asked)
    except (PipelineError, OSError) as fault:
        print(f"promote: {fault}", file=sys.stderr)
    except mlflow.MlflowException as fault:
        print(
            f"promote: MLflow at {mlflow.get_tracking_uri()} refused: {str(fault).splitlines()[0]}. Nothing is lost: "
            "the same command carries on. runtime.tracking_uri or MLFLOW_TRACKING_URI say where it is.",
            file=sys.stderr,
        )
    return 2


def promote(asked: argparse.Namespace) -> int:
    """Everything is read and checked first; then copied; then registered."""
    manifest.verify(EXPORT)
    recorded = manifest.read(EXPORT)
    if recorded["adapter"] != manifest.digests(ADAPTER):
        raise DataError(f"{EXPORT}: was made from another adapter than {ADAPTER}. Run `dvc repro`, or `dvc checkout`.")
    p, params = config.load(Params), config.values()
    predictions = files.read_rows(PREDICTIONS)
    faults = unrecorded()
    if faults and not asked.allow_dirty:
        raise DataError(
            "no commit makes this export:\n  "
            + "\n  ".join(faults[:10])
            + "\nRun `dvc repro`, commit what changed (dvc.lock, params.yaml, code), then promote; or --allow-dirty."
        )
    experiment_id = tracking.connect(tracking.address(params["runtime"]["tracking_uri"]))
    experiment, run = made_by(asked.exp, params, experiment_id)
    name = asked.name or f"{recorded['base']['id'].split('/')[-1]}-tuned"
    digest = manifest.sha256_of(EXPORT)
    target = asked.to or PROMOTED / name / digest[:12]
    check_free(target, digest)
    known, champion = registry.versions(name), registry.champion(name)
    version = known[digest] if digest in known else None
    is_champion = champion is not None and version is not None and champion.version == version.version
    told = (
        registry.Judgement("better", ["is the champion already"]) if is_champion else judged(predictions, champion, p)
    )

    if not target.is_dir() or not any(target.iterdir()) or manifest.faults(target):
        commit = _output("git", "rev-parse", "HEAD").strip()
        origin = {"commit": commit, "is_dirty": bool(faults), "experiment": experiment, "run_id": run.info.run_id}
        manifest.copy(EXPORT, target, origin)
    if version is None:
        version = registry.register(name, target, PREDICTIONS, run)
    if not is_champion:
        registry.tell(name, version, told)
    place = "champion" if told.word == "better" else f"candidate ({told.word})"
    origin = manifest.read(target)["promoted"]
    print(f"{target}: a verified copy, from commit {origin['commit'][:12]}, experiment {origin['experiment']}")
    print("\n".join(told.lines))
    print(f"{name} version {version.version} is {place}")
    print(f"What an upload to the hub would send: make publish REPO=<owner>/{name} DIR={target}")
    return 0 if told.word == "better" else 1


def judged(predictions: list[dict[str, Any]], champion: Any, p: Params) -> registry.Judgement:
    """Against the present champion, whose predictions are in MLflow; against the baselines where there is none."""
    if champion is None:
        return registry.judge(predictions, None, "", p.evaluate)
    theirs, name = registry.predictions(champion), f"version {champion.version}"
    if theirs is None:
        return registry.Judgement("cannot tell", [f"{name} has no predictions in MLflow to compare with"])
    return registry.judge(predictions, theirs, name, p.evaluate)


def unrecorded() -> list[str]:
    """Why the working tree is not what a commit and its dvc.lock say, one line each; empty where it is."""
    changed = _output("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    faults = [
        f"{line[3:]}: not committed" for line in changed if line[:2] != "??" or line[3:].startswith(READ_BY_STAGES)
    ]
    shown = _output(sys.executable, "-m", "dvc", "status", "--json", "--with-deps", "quantize_export")
    for stage, entries in json.loads(shown).items():
        for entry in entries:  # "changed command", or {"changed deps": {path: "modified"}}
            if isinstance(entry, str):
                faults.append(f"{stage}: {entry}")
                continue
            states = [state for changed in entry.values() for state in changed.items()]
            faults += [f"{stage}: {path} {state}" for path, state in states if not _is_elsewhere(path, state)]
    return faults


def _is_elsewhere(path: str, state: str) -> bool:
    """Whether something is only not on this machine (not pulled, or cleaned away), and promote does not read it."""
    is_absent = state in ("deleted", "not in cache") and path.startswith(("models/", "data/"))
    return is_absent and Path(path) not in (EXPORT, ADAPTER)


def made_by(given: str | None, params: dict[str, Any], experiment_id: str) -> tuple[str, Any]:
    """The experiment that trained the adapter, with its MLflow run.

    It is the one that was named, or that `dvc repro` gave its name to, or the one DVC experiment with this adapter.

    Raises: DataError, when there is none, or several, or the one that was named trained another adapter.
    """
    adapter = _adapter(Path("dvc.lock").read_text(encoding="utf-8") if Path("dvc.lock").exists() else "")
    adapters = {
        name: _adapter(kept.at_revision(revision)("dvc.lock") or "")
        for name, (revision, _) in kept.references().items()
    }
    alike = [name for name, md5 in adapters.items() if adapter and md5 == adapter]
    if given in adapters and given not in alike:
        raise DataError(
            f"--exp {given}: trained another adapter than {ADAPTER}, expected {' or '.join(alike) or 'none'}."
        )
    own = tracking.key(params)
    found = {name: registry.find_run(name, experiment_id) for name in ([given] if given else [own, *alike])}
    runs = {name: run for name, run in found.items() if run is not None}
    if not given and own in runs:
        runs = {own: runs[own]}
    if len(runs) != 1:
        raise DataError(
            f"the MLflow run that made {EXPORT}: found {', '.join(runs) or 'none'}, expected one. "
            "`make sync` brings experiments into MLflow; EXP=<name> says which one it is."
        )
    return next(iter(runs.items()))


def check_free(target: Path, digest: str) -> None:
    """Raises: DataError, when a copy would take the place of anything but an earlier copy of the same export."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    held = manifest.read(target) if (target / manifest.NAME).is_file() else {}
    if "promoted" not in held or held["promoted"]["manifest_sha256"] != digest:
        raise DataError(f"{target}: holds something else, expected an absent or empty folder. Name another one in TO.")


def _adapter(lock: str) -> str | None:
    """The md5 of models/adapter in the text of a dvc.lock."""
    stages = (yaml.safe_load(lock) or {}).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return next((out["md5"] for out in outs if out["path"] == ADAPTER.as_posix()), None)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ExternalError(f"{' '.join(command[:3])}: {done.stderr.strip()[-400:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
