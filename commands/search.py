"""make search: let Optuna propose the points of a sweep and DVC run them: make search SWEEP=search_lora [J=2]

SWEEP names a file of conf/sweep with `search`. The trials are kept in runs/sweeps/<id>/study.journal, or in the
database that OPTUNA_STORAGE names, where drivers on several machines share one search. The same command goes on where
it was.
Exit 0: every trial is complete or was pruned; 1: some failed, listed with their reason; 2: the search cannot be read.
"""

import argparse
import os
import sys

from commands import sync
from commands.params import FAULTS, composed
from stages.lib.errors import PipelineError
from stages.lib.experiments import points, running, search


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="search", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("sweep", help="a file of conf/sweep, without .yaml")
    known.add_argument("--workers", type=int, default=1, help="trials at a time")
    known.add_argument("--retry", action="store_true", help="try the points again that failed")
    known.add_argument("--lost-host", help="finish the trials of this machine's drivers, too, which are gone")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        return run(asked)
    except FAULTS as fault:
        print(f"search: conf/ does not compose with sweep={asked.sweep}: {fault}", file=sys.stderr)
    except PipelineError as fault:
        print(f"search: {fault}", file=sys.stderr)
    return 2


def run(asked: argparse.Namespace) -> int:
    p = points.sweep(composed([f"sweep={asked.sweep}"])["sweep"])
    state = points.state_of(composed(points.Point("", p.fixed).overrides()), p.target)
    for point in search.corners(p, state):
        composed([*point.overrides(), f"sweep.id={p.id}"])
    study = search.open_study(p, state, os.environ.get("OPTUNA_STORAGE"))
    print(f"search {p.id}: {search.summary(study, p)}", flush=True)
    running.end_on_signals()
    try:
        for ended in search.run(study, p, state, workers=asked.workers, retry=asked.retry, lost_host=asked.lost_host):
            print(ended, flush=True)
    except KeyboardInterrupt:
        print(f"search {p.id}: interrupted; the same command goes on", file=sys.stderr)
        return 1
    failed = search.reasons(study)
    if failed:
        print(f"{len(failed)} trials failed; ARGS=--retry tries these again:", *failed, sep="\n  ", file=sys.stderr)
    sync.main()
    print(f"search {p.id}: {search.summary(study, p)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
