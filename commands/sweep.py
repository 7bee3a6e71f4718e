"""make sweep: run the points of a sweep that are missing: make sweep SWEEP=rank_lr [J=2]

SWEEP names a file of conf/sweep. Points that DVC has already are left alone, so that a sweep that was interrupted goes
on where it was. Exit 0: every point is there; 1: some failed, listed with their reason; 2: the sweep cannot be read.
"""

import argparse
import functools
import sys

from omegaconf import OmegaConf

from commands.params import FAULTS, composed
from stages.lib.errors import PipelineError
from stages.lib.experiments import cluster, kept, points, running
from stages.lib.schema.sweep import Sweep


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("sweep", help="a file of conf/sweep, without .yaml")
    known.add_argument(
        "--workers", type=int, default=1, help="points at a time; on a cluster, on each node without GPUs"
    )
    known.add_argument("--ray", metavar="HOST:PORT", help="of a Ray cluster to spread over: docs/cluster.md")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        params = composed([f"sweep={asked.sweep}"])
    except FAULTS as fault:
        print(f"sweep: conf/ does not compose with sweep={asked.sweep}: {fault}", file=sys.stderr)
        return 2
    p = Sweep(**OmegaConf.to_container(OmegaConf.create(params["sweep"])))  # type: ignore[arg-type]
    every = points.expand(p, state=points.state_of(params, p.target))
    wanted = points.missing(every, kept.references())
    print(f"sweep {p.id}: {len(every)} points, {len(every) - len(wanted)} there, {len(wanted)} to run", flush=True)
    spread = functools.partial(cluster.run_all, address=asked.ray) if asked.ray else running.run_all
    failed = 0
    try:
        for done in spread(wanted, p, workers=asked.workers):
            failed += done.status != "done"
            said = f": {done.reason} ({done.log})" if done.reason else ""
            print(f"{done.point.name} {done.status} in {done.seconds:.0f} s{said}", flush=True)
    except PipelineError as fault:
        print(f"sweep: {fault}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
