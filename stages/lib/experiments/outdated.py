"""Which stages `dvc exp run` would run for some parameters, and why."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.lib import tracking
from stages.lib.errors import ExternalError
from stages.lib.experiments import kept


def stages(params: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> why it would run, in the order of dvc.yaml. DVC's run cache may still give back what it ran before.

    Args: params: nested, as composition gives them; they need not be those of params.yaml.
    Raises: ExternalError, when `dvc status` fails.
    """
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    lock = kept.parse(Path("dvc.lock").read_text()) if Path("dvc.lock").exists() else {}
    return reasons(pipeline, lock, params, status())


def reasons(
    pipeline: Mapping[str, Any], lock: Mapping[str, Any], params: Mapping[str, Any], changed: Mapping[str, list[str]]
) -> dict[str, str]:
    """As `stages`, from what was read. changed: what `dvc status` says beside parameters, by stage."""
    recorded = lock.get("stages", {})
    current = kept.up_to_date(pipeline, lock, params)
    names = pipeline["stages"]
    found: dict[str, str] = {}
    for name in names:
        if name not in recorded:
            found[name] = "it never ran"
        elif differing := _differing(recorded[name], params):
            found[name] = f"other {', '.join(differing)}"
        elif changed.get(name):
            found[name] = ", ".join(changed[name])
        elif before := _before(names, name, found):
            found[name] = f"after {before}"
        elif name not in current:
            found[name] = "its inputs are of another run"
    return found


def _differing(recorded: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Sections of parameters that are not what they were when a stage last ran."""
    of_params = recorded.get("params", {}).get("params.yaml", {})
    return [key for key, value in of_params.items() if params.get(key) != value]


def _before(pipeline: Mapping[str, Any], name: str, found: Mapping[str, str]) -> str:
    """The first stage this one reads from that would run; empty where none would."""
    deps = set(tracking.paths(pipeline, name, "deps"))
    kinds = ("outs", "metrics", "plots")
    return next((s for s in found if any(deps & set(tracking.paths(pipeline, s, kind)) for kind in kinds)), "")


def status() -> dict[str, list[str]]:
    """What `dvc status` says of code, data and outputs, by stage: one phrase each.

    Raises: ExternalError, with DVC's message.
    """
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExternalError(f"dvc status: {done.stderr.strip()[-400:]}")
    return {name: found for name, entries in json.loads(done.stdout).items() if (found := _phrases(entries))}


def _phrases(entries: list[Any]) -> list[str]:
    """`changed command`, or `3 of code changed`, `models/base deleted`; parameters are left out."""
    found: list[str] = []
    code = 0
    for entry in entries:
        if isinstance(entry, str):
            found.append(entry)
            continue
        for changes in entry.values():
            for path, state in changes.items():
                if path == "params.yaml":
                    continue
                if path.startswith("stages/"):
                    code += 1
                else:
                    found.append(f"{path} {state}")
    return [f"{code} files of code changed" if code > 1 else "a file of code changed"] * bool(code) + found
