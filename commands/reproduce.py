"""make reproduce RUN=...: run an experiment again in a clean clone of its commit, and hold every output to its hash.

    python -m commands.reproduce <MLflow run id | experiment | commit> [--until STAGE] [--exact] [--keep] [--at FOLDER]

Exit 0: reproduced, bit for bit or within noise; 1: not (with --exact also within noise); 2: it cannot be tried.
"""

import argparse
import sys
from pathlib import Path

from stages.lib import environment
from stages.lib.errors import PipelineError
from stages.lib.experiments import reproduction


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(
        prog="reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known.add_argument("run", help="MLflow run id, name of an experiment, branch, tag or commit")
    known.add_argument("--until", metavar="STAGE", help="the last stage to run; by default all that are recorded")
    known.add_argument("--exact", action="store_true", help="within noise is not enough")
    known.add_argument("--keep", action="store_true", help="keep the clone also when it was reproduced bit for bit")
    known.add_argument("--at", type=Path, metavar="FOLDER", help="an absent folder for the clone, instead of runs/")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        experiment = reproduction.locate(asked.run)
        folder = asked.at or environment.root() / "runs" / "reproduce" / experiment.name.replace("/", "-")
        if asked.at is None:
            reproduction.remove(folder)  # of a try before
        print(f"{experiment.name}: commit {experiment.revision[:12]}, run again in {folder}", flush=True)
        found = reproduction.reproduce(
            experiment, folder, until=asked.until, say=lambda line: print(f"  {line}", flush=True)
        )
    except PipelineError as fault:
        print(f"reproduce: {fault}", file=sys.stderr)
        return 2
    print("\n".join(reproduction.report(found)))
    if found.first is None and not found.failed and not asked.keep:
        reproduction.remove(folder)
    else:
        print(f"to look at: {folder}, {reproduction.log(folder)}")
    return 0 if found.is_exact() or (not asked.exact and found.verdict() == "reproduced within noise") else 1


if __name__ == "__main__":
    sys.exit(main())
