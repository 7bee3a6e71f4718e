"""What distinguishes two experiments: parameters, stages whose outputs differ and why, code, scores."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from stages.lib import comparison, config, files, tracking
from stages.lib.comparison import Line
from stages.lib.experiments import kept, results, uncertainty
from stages.lib.experiments.kept import Experiment
from stages.lib.experiments.results import Measure, Setting
from stages.lib.experiments.uncertainty import Figures, Interval, Needed
from stages.lib.schema.evaluate import Evaluate

CODE = ("stages", "conf", "hydra_plugins", "requirements.lock", "dvc.yaml")
ABSENT = "(absent)"


@dataclass(frozen=True)
class Stage:
    """A stage whose outputs differ. params, files: keys and files it reads that differ; inputs: outputs of earlier
    stages that do. All empty: equal inputs, and yet other bytes."""

    name: str
    outs: tuple[str, ...]
    params: tuple[str, ...]
    files: tuple[str, ...]
    inputs: tuple[str, ...]


def parameters(one: Experiment, other: Experiment) -> dict[str, tuple[Any, Any]]:
    """Keys with different values, those that can change a result."""
    left, right = (
        config.flat({key: value for key, value in each.params.items() if key not in tracking.UNTRACKED})
        for each in (one, other)
    )
    return {
        key: (left.get(key, ABSENT), right.get(key, ABSENT))
        for key in sorted(left.keys() | right.keys())
        if left.get(key, ABSENT) != right.get(key, ABSENT)
    }


def stages(one: Experiment, other: Experiment) -> list[Stage]:
    """Stages that both have up to date and whose outputs differ, in the order of the pipeline: the first explains."""
    shared = [name for name in one.stages if name in other.stages]
    locks = [kept.parse(each.read("dvc.lock") or "{}")["stages"] for each in (one, other)]
    made = {out["path"] for lock in locks for entry in lock.values() for out in entry.get("outs", [])}
    found = []
    for name in shared:
        entries = [lock[name] for lock in locks]
        outs = _differing(*(_hashes(entry, "outs") for entry in entries))
        if not outs:
            continue
        deps = _differing(*(_hashes(entry, "deps") for entry in entries))
        params = _differing(*(config.flat(entry.get("params", {}).get("params.yaml", {})) for entry in entries))
        inputs = tuple(path for path in deps if path in made)
        found.append(Stage(name, outs, params, tuple(path for path in deps if path not in made), inputs))
    return found


def _hashes(entry: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {each["path"]: each["md5"] for each in entry.get(part, [])}


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key))


def code(one: Experiment, other: Experiment) -> str:
    """What `git diff --stat` says of code, configuration and environment; empty where they are equal."""
    command = ["git", "diff", "--stat=100", one.revision, other.revision, "--", *CODE]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.rstrip()


@dataclass(frozen=True)
class Scores:
    """The second experiment minus the first. lines: of these two trainings, over test rows. over_seeds: main measures
    and losses by setting, over rows and seeds, with this confidence; empty unless both have several seeds."""

    lines: list[Line]
    over_seeds: dict[Measure, Interval]
    figures: dict[Measure, Figures]
    confidence: float

    def verdict(self) -> str:
        """`better`: on the main measure of one task at least, and worse on none; `worse`: on one at least."""
        words = [
            self.word(comparison.main_measure(self.lines, task)) for task in sorted({line.task for line in self.lines})
        ]
        return "worse" if "worse" in words else "better" if "better" in words else "cannot tell"

    def settled_by(self, measure: Measure) -> Needed:
        """The seeds, or test rows, that would tell a difference of the size seen."""
        found = self.figures[measure]
        return uncertainty.needed(found, 1, 0, critical=float(norm.ppf((1 + self.confidence) / 2)))

    def word(self, line: Line) -> str:
        """Over seeds where they are known, since two single trainings differ by chance as well."""
        found = self.over_seeds.get(Measure(line.task, line.measure))
        return found.verdict(higher_is_better=line.higher_is_better) if found else line.verdict("theirs")


def scores(one: Setting, first: Experiment, other: Setting, second: Experiment, p: Evaluate) -> Scores:
    """Compare what two experiments answered, and where both settings have several seeds, what the settings do.

    Raises: DataError, when they have no test row in common, or predictions are not in DVC's cache.
    """
    ours, theirs = (
        files.read_rows(kept.files(each, results.EVALUATION)[results.PREDICTIONS]) for each in (second, first)
    )
    lines = comparison.between(ours, theirs, p)
    if min(len(one.trainings), len(other.trainings)) < 2:
        return Scores(lines, {}, {}, p.confidence)
    tables = [[results.scored(each) for each in setting.trainings.values()] for setting in (one, other)]
    measures = _judging(lines)
    figures = {}
    for measure in measures:
        by_setting, weights = results.scores(tables, measure)
        figures[measure] = uncertainty.figures(by_setting, weights, samples=p.bootstrap_samples, seed=p.seed)
    # one confidence for all main measures together
    tasks = len({measure.task for measure in measures})
    confidence = 1 - (1 - p.confidence) / tasks
    difference = np.array([-1.0, 1.0])
    over_seeds = {
        each: uncertainty.interval(found, difference, confidence=confidence) for each, found in figures.items()
    }
    return Scores(lines, over_seeds, figures, confidence)


def _judging(lines: Sequence[Line]) -> list[Measure]:
    """What judges each task, and its loss."""
    tasks = sorted({line.task for line in lines})
    return [Measure(task, name) for task in tasks for name in (comparison.main_measure(lines, task).measure, "loss")]
