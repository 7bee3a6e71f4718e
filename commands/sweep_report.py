"""make sweep-report: what a sweep answers, and how surely: make sweep-report SWEEP=<id> [METRIC=...] [OUT=...]

Writes runs/sweeps/<id>/report.html and prints its conclusions. Reads what DVC keeps of every experiment with this
sweep.id; MLflow and logs are asked only for what failed. Exit 0: written; 2: no such sweep, or it cannot be analysed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.params import FAULTS, composed
from stages.lib import config, files, tracking
from stages.lib.errors import DataError, PipelineError
from stages.lib.experiments import analysis, points, results, running, sweep_page
from stages.lib.experiments.kept import Experiment
from stages.lib.experiments.results import Counts, Measure
from stages.lib.schema.evaluate import Evaluate


@dataclass
class Params:
    """The section of params.yaml that says how intervals are made."""

    evaluate: Evaluate


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(
        prog="sweep-report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known.add_argument("sweep", help="sweep.id of the experiments")
    known.add_argument("--metric", help="task/measure to judge by; by default what judges the task with most rows")
    known.add_argument("--out", type=Path, help="the page, instead of runs/sweeps/<id>/report.html")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        return report(asked)
    except PipelineError as fault:
        print(f"sweep-report: {fault}", file=sys.stderr)
        return 2


def report(asked: argparse.Namespace) -> int:
    p, experiments = config.load(Params).evaluate, results.of_sweep(asked.sweep)
    evaluated = [each for each in experiments if results.EVALUATION in each.outs]
    if not evaluated:
        raise DataError(
            f"{asked.sweep}: none of its {len(experiments)} experiments is evaluated, expected one at least."
        )
    settings = results.settings(evaluated)
    tables = [[results.scored(each) for each in setting.trainings.values()] for setting in settings]
    flat = [table for of_setting in tables for table in of_setting]
    measures = results.measures(flat)
    chosen = results.choose(measures, asked.metric, flat)
    judged = [analysis.analyse(settings, tables, measure, p) for measure in [chosen, *_others(measures, chosen)]]
    used = [each for setting in settings for each in setting.trainings.values()]
    counts = counted(asked.sweep, experiments, evaluated, {each.name for each in used})
    notes = told_of(results.mixed(used))
    page = asked.out or running.folder(asked.sweep) / "report.html"
    model = evaluated[-1].params["base_model"]["id"].split("/")[-1]
    with files.replacing(page) as new:
        new.write_text(
            sweep_page.render(judged, counts, sweep_id=asked.sweep, notes=notes, model=model), encoding="utf-8"
        )
    planned_too = "" if counts.planned is None else f", {counts.planned} planned"
    print(
        f"sweep {asked.sweep}: {counts.analysed} of {counts.done} experiments in {len(settings)} settings{planned_too}"
    )
    print(sweep_page.headline(judged[0]))
    print("\n".join(f"  {line}" for line in [*sweep_page.answers(judged[0]), *sweep_page.warnings(judged[0]), *notes]))
    if counts.absent:
        print(
            f"{len(counts.of('running'))} points run still, {len(counts.of('pruned'))} were pruned, "
            f"{len(counts.failures)} failed or were left: the page lists them"
        )
    print(f"sweep-report: {page}")
    return 0


def told_of(mixed: Sequence[str]) -> list[str]:
    """What a reader must know of trainings that are not of one state of code and data."""
    few = ", ".join(mixed[:3]) + (f" and {len(mixed) - 3} more" if len(mixed) > 3 else "")
    return [f"The trainings compared differ in more than their parameters: {few}."] if mixed else []


def _others(measures: Sequence[Measure], chosen: Measure) -> list[Measure]:
    """What judges each task, and its loss, beside the chosen one."""
    firsts = [next(each for each in measures if each.task == task) for task in dict.fromkeys(m.task for m in measures)]
    wanted = [each for first in firsts for each in (first, Measure(first.task, "loss"))]
    return [each for each in wanted if each != chosen]


def counted(
    sweep_id: str, experiments: Sequence[Experiment], evaluated: Sequence[Experiment], used: set[str]
) -> Counts:
    """What became of the sweep's points, by DVC, MLflow, logs, and the sweep's file where there is one."""
    done = [each.name for each in experiments]
    rows = results.mlflow_rows(sweep_id, tracking.address(config.values()["runtime"]["tracking_uri"]))
    logs = {}
    for path in sorted(running.folder(sweep_id).glob("*.log")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        logs[path.stem] = lines[-1] if lines else ""
    names = {each.name for each in evaluated}
    return Counts(
        done=len(done),
        analysed=len(used),
        superseded=sorted(names - used),
        unevaluated=sorted(set(done) - names),
        absent=results.absent(done, running.at_work(sweep_id), running.outcomes(sweep_id), rows or {}, logs),
        planned=planned(sweep_id),
        in_mlflow=None if rows is None else len(set(done) & rows.keys()),
    )


def planned(sweep_id: str) -> int | None:
    """How many points the file of conf/sweep with this id names; None where there is none, or points are searched."""
    if not Path("conf/sweep", f"{sweep_id}.yaml").exists():
        return None
    try:
        section = composed([f"sweep={sweep_id}"])["sweep"]
    except FAULTS:
        return None
    p = points.sweep(section)
    return None if p.id != sweep_id or p.search else len({point.name for point in points.expand(p, state=lambda _: "")})


if __name__ == "__main__":
    sys.exit(main())
