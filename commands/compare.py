"""make compare: what distinguishes two experiments, and whether the second is better: make compare A=<name> B=<name>

A and B: names that `dvc exp list` shows, or commits. Differences are B minus A, over the same test rows; where each has
experiments that differ from it in the seed alone, over seeds as well.
Exit 0: B is better, or it cannot be told; 1: B is worse; 2: they cannot be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stages.lib import config
from stages.lib.errors import PipelineError
from stages.lib.evaluation_page import figure, p_value, signed
from stages.lib.experiments import differences, kept, results, sweep_page
from stages.lib.experiments.differences import Scores, Stage
from stages.lib.experiments.results import Measure, Setting
from stages.lib.schema.evaluate import Evaluate


@dataclass
class Params:
    """The section of params.yaml that says how two models are compared."""

    evaluate: Evaluate


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("a", help="the experiment to compare with")
    known.add_argument("b", help="the experiment that may be better")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        return compare(asked.a, asked.b)
    except PipelineError as fault:
        print(f"compare: {fault}", file=sys.stderr)
        return 2


def compare(a: str, b: str) -> int:
    p = config.load(Params).evaluate
    one, other = kept.find(a), kept.find(b)
    every = kept.every()
    settings = results.alike(one, every), results.alike(other, every)
    found = differences.scores(settings[0], one, settings[1], other, p)
    print(f"A {one.name} ({one.revision[:12]})\nB {other.name} ({other.revision[:12]})")
    changed = differences.parameters(one, other)
    _print("Parameters", [f"{key}: {left} -> {right}" for key, (left, right) in changed.items()])
    _print("Outputs", [_stage(each) for each in differences.stages(one, other)])
    _print("Code", differences.code(one, other).splitlines())
    _print(f"Test rows, B less A, {100 * p.confidence:g}% intervals, these two trainings", _lines(found))
    if found.over_seeds:
        _print(f"Rows and seeds, {_seeds(settings)}", _over_seeds(found))
    else:
        print(f"Seeds: {_seeds(settings)}. What another seed would give is in none of these intervals.")
    word = found.verdict()
    said = {"better": "B is better than A", "worse": "B is worse than A", "cannot tell": "B cannot be told from A"}[
        word
    ]
    print(f"compare: {said}" + (", over seeds." if found.over_seeds else ", as these two trainings go."))
    return 1 if word == "worse" else 0


def _print(title: str, lines: Sequence[str]) -> None:
    print(f"{title}:" if lines else f"{title}: equal")
    print("".join(f"  {line}\n" for line in lines), end="")


def _stage(stage: Stage) -> str:
    causes = [
        f"{name} {', '.join(items)}"
        for name, items in (("parameters", stage.params), ("files", stage.files), ("inputs", stage.inputs))
        if items
    ]
    cause = "; ".join(causes) or "nothing recorded: equal inputs gave other bytes"
    return f"{stage.name}: {', '.join(stage.outs)} differ, by {cause}"


def _lines(found: Scores) -> list[str]:
    rows = []
    for line in found.lines:
        told = line.against["theirs"]
        rows.append(
            f"{line.task + '/' + line.measure:<32} {figure(line.arms['theirs']):>8} {figure(line.arms['ours']):>8}  "
            f"{signed(told.delta):>7} [{signed(told.low)}, {signed(told.high)}]  "
            f"{told.up} rows up, {told.down} down, p {p_value(told.p_adjusted)}  {line.verdict('theirs')}"
        )
    return rows


def _over_seeds(found: Scores) -> list[str]:
    def settled(measure: Measure) -> str:
        asked = found.settled_by(measure)
        seeds, rows = sweep_page.number(asked.seeds), sweep_page.number(asked.rows)
        return f"; {seeds} seeds of each would tell, or {rows} test rows"

    return [
        f"{measure!s:<32} {figure(found.figures[measure].means[0]):>8} {figure(found.figures[measure].means[1]):>8}  "
        f"{signed(each.value):>7} [{signed(each.low)}, {signed(each.high)}]  one seed to another "
        f"{figure(found.figures[measure].seeds.sd)}  {each.verdict(higher_is_better=measure.higher_is_better)}"
        + ("" if each.is_told else settled(measure))
        for measure, each in found.over_seeds.items()
    ]


def _seeds(settings: tuple[Setting, Setting]) -> str:
    return " and ".join(
        f"{name} {', '.join(map(str, each.trainings))}" for name, each in zip("AB", settings, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
