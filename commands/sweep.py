"""make sweep: run the points of a sweep that are missing: make sweep SWEEP=rank_lr [J=2]

SWEEP names a file of conf/sweep. Points that DVC has already are left alone, so that a sweep that was interrupted, or
some of whose points failed, goes on where it was. `--list` shows the points, and why some are missing.
Exit 0: every point is there; 1: some failed, listed with their reason; 2: the sweep cannot be read.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from commands import sync
from commands.params import FAULTS, composed
from stages.lib.errors import ConfigError, PipelineError
from stages.lib.experiments import cluster, kept, points, running
from stages.lib.schema.sweep import Sweep


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("sweep", help="a file of conf/sweep, without .yaml")
    known.add_argument("--workers", type=int, default=1, help="points at a time, on each node of a cluster")
    known.add_argument("--ray", metavar="HOST:PORT", help="of a Ray cluster to spread over: docs/cluster.md")
    known.add_argument("--list", action="store_true", help="show the points, run none")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        return sweep(asked)
    except FAULTS as fault:
        print(f"sweep: conf/ does not compose with sweep={asked.sweep}: {fault}", file=sys.stderr)
    except PipelineError as fault:
        print(f"sweep: {fault}", file=sys.stderr)
    return 2


def sweep(asked: argparse.Namespace) -> int:
    p = points.sweep(composed([f"sweep={asked.sweep}"])["sweep"])
    if p.id is None:
        raise ConfigError(f"sweep.id: found null in conf/sweep/{asked.sweep}.yaml, expected a name for its experiments")
    if p.search is not None:
        raise ConfigError(
            f"sweep.search: found one in conf/sweep/{asked.sweep}.yaml, expected null: `make search` runs it"
        )
    every = points.expand(p, state=state(p))
    known = kept.references()
    wanted = points.missing(every, known)
    print(f"sweep {p.id}: {len(every)} points, {len(every) - len(wanted)} there, {len(wanted)} to run", flush=True)
    last = {found["name"]: found for found in running.outcomes(str(p.id))}
    if asked.list:
        for point in every:
            print(f"  {point.name}  {' '.join(point.overrides())}  {told(point, known, last)}")
        return 1 if wanted else 0
    for point in points.covering(wanted):
        composed([*point.overrides(), f"sweep.id={p.id}"])
    running.end_on_signals()
    run_all = functools.partial(cluster.run_all, address=asked.ray) if asked.ray else running.run_all
    outcomes = []
    try:
        for done in run_all(wanted, p, workers=asked.workers):
            outcomes.append(done)
            print(f"{done.point.name} {done.status} in {done.seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"sweep {p.id}: interrupted; the same command goes on", file=sys.stderr)
        return 1
    failed = [done for done in outcomes if done.status != "done"]
    lines = [
        f"  {' '.join(done.point.overrides())}\n    {done.status}: {done.reason}\n    {done.log}" for done in failed
    ]
    if lines:
        print(
            "\n".join([f"{len(failed)} points are missing; the same command runs these alone:", *lines]),
            file=sys.stderr,
        )
    sync.main()
    # DVC remembers what it has read of an experiment: half a second each now, none when somebody asks
    subprocess.run(["dvc", "exp", "show", "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return 1 if failed else 0


def state(p: Sweep) -> Callable[[Mapping[str, Any]], str]:
    """points.state_of for the values of a point, composed once for those that choose the same files."""

    @functools.cache
    def chosen(*overrides: str) -> str:
        return points.state_of(composed(overrides), p.target)

    def of_values(values: Mapping[str, Any]) -> str:
        files = points.choosing(values)
        common = {key: value for key, value in values.items() if key in p.fixed or key in files}
        return chosen(*points.Point("", common).overrides())

    return of_values


def told(point: points.Point, known: Collection[str], last: Mapping[str, Any]) -> str:
    """Whether DVC has a point, or how it ended last."""
    if point.name in known:
        return "there"
    return f"{last[point.name]['status']}: {last[point.name]['reason']}" if point.name in last else "to run"


if __name__ == "__main__":
    sys.exit(main())
