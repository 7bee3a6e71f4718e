"""The experiments DVC keeps: commits under refs/exps, each with its parameters, hashes of outputs, metrics and plots.

    refs/exps/<baseline's hash>/<name>  ->  Experiment  ->  files of its outputs, in DVC's cache

Everything that looks at experiments reads them here. MLflow shows the same; it knows more only of what failed, and of
times, speeds and memory.
"""

import difflib
import functools
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.lib import stage
from stages.lib.errors import ConfigError, DataError

Reader = Callable[[str], str | None]
"""Text of a file of one experiment, by its path in the repository; None where it does not exist."""

READ = ("params.yaml", "dvc.yaml", "dvc.lock")


@dataclass(frozen=True)
class Experiment:
    """What one commit recorded.

    name: DVC's, or what was asked for of a commit that is no experiment. revision, baseline: hashes of commits; the
    baseline is the one it was run on, itself for no experiment. params: nested, as in params.yaml. metrics: of the
    stages that are up to date, by stage. outs: path -> md5 of the outputs of these stages.
    """

    name: str
    revision: str
    baseline: str
    params: dict[str, Any]
    stages: tuple[str, ...]
    metrics: dict[str, dict[str, float]]
    outs: dict[str, str]

    def read(self, path: str) -> str | None:
        """Text of a file as this experiment committed it, e.g. plots/train.csv; None where it does not exist."""
        return at_revision(self.revision)(path)


def every() -> list[Experiment]:
    """All experiments of this repository, by name; of several with one name the one on the latest baseline."""
    return [read(name, *commits) for name, commits in sorted(references().items())]


def find(name: str) -> Experiment:
    """The experiment of a name, or what a branch, tag or commit recorded.

    Raises: ConfigError, naming the nearest names where neither is known.
    """
    known = references()
    if name in known:
        return read(name, *known[name])
    commit = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    if commit:
        return read(name, commit, commit)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:3]
    listed = f"; near it: {', '.join(near)}" if near else ""
    raise ConfigError(
        f"experiment: found {name!r}, expected a name that `dvc exp list --all-commits` shows, or a commit{listed}. "
        "Of somebody else's: `dvc exp pull <remote> <name>` first."
    )


def references() -> dict[str, tuple[str, str]]:
    """Name -> commit and baseline of every experiment of this repository."""
    shown = _git("for-each-ref", "--sort=committerdate", "--format=%(refname) %(objectname)", "refs/exps")
    pairs = [line.split() for line in shown.splitlines()]
    # refs/exps/ab/cdef.../name; other references below refs/exps are DVC's own
    parts = [(ref.split("/"), commit) for ref, commit in pairs]
    return {found[4]: (commit, found[2] + found[3]) for found, commit in parts if len(found) == 5}


def read(name: str, revision: str, baseline: str) -> Experiment:
    """What a commit recorded of the stages whose results belong to its parameters."""
    text = texts(revision, READ)
    params, pipeline, lock = (parse(text[path] or "{}") for path in READ)
    current = up_to_date(pipeline, lock, params)
    written = texts(revision, [f"metrics/{stage}.json" for stage in current])
    metrics = {Path(path).stem: json.loads(found) for path, found in written.items() if found}
    outs = {out["path"]: out["md5"] for name in current for out in lock["stages"][name].get("outs", [])}
    return Experiment(name, revision, baseline, params, tuple(current), metrics, outs)


def at_revision(revision: str) -> Reader:
    """Read one file after the other as a commit has them."""
    return lambda path: texts(revision, [path])[path]


def texts(revision: str, paths: Sequence[str]) -> dict[str, str | None]:
    """Contents of files as a commit has them; None where one does not exist. One process of git for all of them."""
    asked = "".join(f"{revision}:{path}\n" for path in paths).encode()
    rest = subprocess.run(["git", "cat-file", "--batch"], input=asked, capture_output=True, check=False).stdout
    found: dict[str, str | None] = {}
    for path in paths:
        head, _, rest = rest.partition(b"\n")  # <hash> blob <bytes>, or <name> missing
        size = 0 if head.endswith(b" missing") else int(head.split()[2])
        found[path] = None if head.endswith(b" missing") else rest[:size].decode()
        rest = rest[size + 1 :] if found[path] is not None else rest
    return found


class _Numbers(yaml.CSafeLoader):
    """Reads 1e-06 as a number, which DVC writes into dvc.lock, and YAML 1.1 takes for text without a point."""


_Numbers.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


@functools.lru_cache(maxsize=8)  # of dvc.yaml, which is the same in most experiments
def parse(text: str) -> Any:
    """YAML as DVC writes it."""
    return yaml.load(text, _Numbers)


def up_to_date(pipeline: Mapping[str, Any], lock: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The stages whose recorded result belongs to these params: others still show numbers of an earlier experiment."""
    recorded = lock.get("stages", {})
    made = {out["path"] for found in recorded.values() for out in found.get("outs", [])}
    outs: dict[str, str] = {}
    good = []
    for name in pipeline.get("stages", {}):
        if name not in recorded:
            continue
        of_params = recorded[name].get("params", {}).get("params.yaml", {})
        has_params = all(params.get(key) == value for key, value in of_params.items())
        has_deps = all(
            outs.get(dep["path"]) == dep["md5"] for dep in recorded[name].get("deps", []) if dep["path"] in made
        )
        if has_params and has_deps:
            good.append(name)
            outs |= {out["path"]: out["md5"] for out in recorded[name].get("outs", [])}
    return good


def files(experiment: Experiment, out: str) -> dict[str, Path]:
    """Where the files of an output lie in DVC's cache, by their paths in it (`.` for a file).

    Raises: DataError, saying how they come here, when the experiment did not make it or the cache lacks it.
    """
    if out not in experiment.outs:
        raise DataError(
            f"{experiment.name}: has no {out} that belongs to its parameters, expected an experiment that ran the "
            f"stage that makes it. `dvc exp show` lists what each has."
        )
    found = stage.cached(experiment.outs[out])
    if not found:
        raise DataError(
            f"{experiment.name}: {out} ({experiment.outs[out]}) is not in DVC's cache. "
            f"`dvc fetch --rev {experiment.revision[:12]} {out}` brings it, where a DVC remote has it."
        )
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout
