"""make clean: free the disk of what can be made again: cached outputs no branch or experiment uses, temporary runs.

Also the resume points of trainings that were killed and not continued; those of running ones stay.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from stages.lib import checkpoints
from stages.lib.experiments.running import at_work


def main() -> int:
    queue = subprocess.run(["dvc", "queue", "status"], capture_output=True, text=True, check=False)
    if running := [line for line in queue.stdout.splitlines() if line.split()[-1:] == ["Running"]]:
        print(
            f"clean: .dvc/tmp/exps: found queued experiments running there ({len(running)}), expected none. "
            "Wait for them (`dvc queue status`), or end them with `dvc queue stop --kill`.",
            file=sys.stderr,
        )
        return 2
    if points := at_work():
        print(f"clean: runs/sweeps: found points running ({', '.join(points)}), expected none", file=sys.stderr)
        return 2
    copies = Path("runs/sweeps").glob("*/at-*")
    for folder in (*Path(".dvc/tmp/exps").glob("tmp*"), *copies, Path("dvc_plots")):
        shutil.rmtree(folder, ignore_errors=True)
    for run in checkpoints.sweep():
        print(f"{run}: resume points of a training that is gone, deleted")
    command = ["dvc", "gc", "--workspace", "--all-branches", "--all-experiments", "--force"]
    print(" ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
