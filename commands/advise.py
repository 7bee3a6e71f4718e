"""make advise: prompt, retrieve or fine-tune? make advise [ARGS="--changing prices"]

    python -m commands.advise [--changing TASK ...]

For each task, from the report on the data and what the untrained base scores (metrics/*.json). --changing says what no
data shows: tasks whose right answers change while the model is in use.
Exit 0: at least one task is worth fine-tuning; 1: none is; 2: too little is known.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from stages.lib import files
from stages.lib.errors import ConfigError, DataError, PipelineError
from stages.lib.experiments import advice

METRICS = Path("metrics")


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="advise", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("--changing", nargs="*", default=[], metavar="TASK", help="tasks whose right answers change")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        known = advice.tasks(read("prepare"), read("dedup_split"), read("evaluate"), changing=asked.changing)
        if strange := sorted(set(asked.changing) - {task.name for task in known}):
            names = ", ".join(task.name for task in known)
            raise ConfigError(f"--changing: found {', '.join(strange)}, expected tasks of the data: {names}.")
    except PipelineError as fault:
        print(f"advise: {fault}", file=sys.stderr)
        return 2
    told = [advice.advise(task) for task in known]
    for found in told:
        print(f"{found.task}: {found.do}")
        print("\n".join(f"  {reason}" for reason in found.reasons))
    return 0 if any(found.do == "fine-tune" for found in told) else 1


def read(stage: str) -> Mapping[str, float]:
    """Metrics of a stage; of evaluate none where it never ran.

    Raises: DataError, where the data was never prepared.
    """
    path = METRICS / f"{stage}.json"
    if path.exists():
        return dict(files.read_json(path))
    if stage == "evaluate":
        return {}
    raise DataError(f"{path}: not found, expected what is known of the data. Run `dvc repro dedup_split`.")


if __name__ == "__main__":
    sys.exit(main())
