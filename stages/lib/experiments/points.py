"""The points of a sweep: from a file of conf/sweep to the experiments that DVC shall run.

fixed {a: 1}, grid {r: [4, 16], seed: [1, 2]}  ->  a=1 r=4 seed=1 | a=1 r=16 seed=1 | a=1 r=4 seed=2 | a=1 r=16 seed=2
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from stages.lib import config, tracking
from stages.lib.schema.sweep import Sweep

PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)  # text that needs no quotes
ANY = "experiment"  # a choice that may change every section
SLOWEST = "seed"  # whole seeds finish first, so that what is there can be compared


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep. name: of the DVC experiment and of the row in MLflow. values: what it sets, by key."""

    name: str
    values: dict[str, Any]

    def overrides(self) -> list[str]:
        """As `dvc exp run -S` and Hydra read them: lora.r=8, split.max_rows.train={parameters:96}."""
        return [f"{key}={literal(value)}" for key, value in self.values.items()]


def sweep(section: Mapping[str, Any]) -> Sweep:
    """The section `sweep` of composed parameters, typed."""
    merged = OmegaConf.merge(OmegaConf.structured(Sweep), OmegaConf.create(dict(section)))
    return cast(Sweep, OmegaConf.to_object(merged))


def expand(p: Sweep, *, state: Callable[[Mapping[str, Any]], str]) -> list[Point]:
    """Every point of a sweep, in the order they are run; of one with neither grid nor points, the one it fixes.

    Args: state: of the repository for the values of a point, see `state_of`.
    """
    keys = sorted(p.grid, key=lambda key: key != SLOWEST)  # stable: the order of the file, but for the seed
    combined = [dict(zip(keys, found, strict=True)) for found in itertools.product(*(p.grid[key] for key in keys))]
    chosen = [*(combined if p.grid or not p.points else []), *p.points]
    ordered = [{key: one[key] for key in sorted(one, key=lambda key: key == SLOWEST)} for one in chosen]
    return [point(str(p.id), values, state(values)) for values in ({**p.fixed, **own} for own in ordered)]


def choosing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a point's values that choose a file: of conf/ (lora=dora), or one that a stage reads (data.path)."""
    named = re.findall(r"\$\{(.+?)\}", Path("dvc.yaml").read_text())
    return {key: value for key, value in values.items() if key in named or Path("conf", key).is_dir()}


def state_of(params: Mapping[str, Any], target: str) -> str:
    """What determines the results of a sweep's points beside what each sets: a hash of parameters, code and data.

    Of the stages up to the target: their commands, the sections of params.yaml they read, and the files they depend on
    that no stage makes. With it a point has the same name today and tomorrow, and another when any of that has changed.

    Args: params: composed with what the points have in common, and with what each chooses (`choosing`).
    """
    stages = yaml.load(Path("dvc.yaml").read_text(), yaml.CSafeLoader)["stages"]
    names = [*tracking.upstream(target), target]
    made = {
        path for name in names for kind in ("outs", "metrics", "plots") for path in tracking.paths(stages, name, kind)
    }
    given = config.flat(dict(params))
    deps = {
        re.sub(r"\$\{(.+?)\}", lambda found: str(given[found[1]]), dep)
        for name in names
        for dep in tracking.paths(stages, name, "deps")
    }
    determining = {
        "commands": [stages[name]["cmd"] for name in names],
        "params": {section: params[section] for name in names for section in stages[name]["params"]},
        "files": {dep: tracking.content(Path(dep)) for dep in sorted(deps - made)},
    }
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def point(sweep_id: str, values: Mapping[str, Any], state: str) -> Point:
    """A point, named after what determines its result."""
    text = json.dumps([dict(values), state], sort_keys=True)
    return Point(f"{sweep_id}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", dict(values))


def covering(points: Sequence[Point]) -> list[Point]:
    """Points that together have every value of every key: whoever composes these has seen all values."""
    seen: set[str] = set()
    chosen = []
    for point in points:
        new = set(point.overrides()) - seen
        if new:
            chosen.append(point)
        seen |= new
    return chosen


def signatures(points: Sequence[Point], target: str) -> dict[str, dict[str, str]]:
    """For each point, by name, and each stage up to the target: what of its values the stage's result depends on.

    Points that agree share the result.

        {"lora.r": 8, "data.fraction": 0.5}  ->  {"base_model": "{}", "prepare": '{"data.fraction": 0.5}', ...}
    """
    stages = yaml.load(Path("dvc.yaml").read_text(), yaml.CSafeLoader)["stages"]
    sections = {
        name: {section for one in (name, *tracking.upstream(name)) for section in stages[one]["params"]}
        for name in (*tracking.upstream(target), target)
    }
    return {
        point.name: {
            name: json.dumps({key: value for key, value in point.values.items() if _section(key) in {*read, ANY}})
            for name, read in sections.items()
        }
        for point in points
    }


def _section(key: str) -> str:
    """lora.r, +lora.new, or the choice of a file (lora=dora) -> lora."""
    return key.lstrip("+~").split(".")[0].split("@")[0]


def missing(points: Sequence[Point], known: Collection[str]) -> list[Point]:
    """Those that no experiment has the name of, each once."""
    by_name = {point.name: point for point in points if point.name not in known}
    return list(by_name.values())


def literal(value: Any) -> str:
    """A value in the grammar of Hydra's overrides.

    {"parameters": 96}  ->  {parameters:96}        ["q_proj", "v_proj"]  ->  [q_proj,v_proj]        None  ->  null
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return '"' + value.replace('"', '\\"') + '"'
    return str(value)
