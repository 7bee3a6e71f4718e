"""make clean: free the disk of what can be made again: cached outputs no branch or experiment uses, temporary runs.

Also the resume points of trainings that were killed and not continued; those of running ones stay.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from stages.lib import checkpoints
from stages.lib.experiments import running


def main() -> int:
    queue = subprocess.run(["dvc", "queue", "status"], capture_output=True, text=True, check=False)
    if queued := [line for line in queue.stdout.splitlines() if line.split()[-1:] == ["Running"]]:
        print(
            f"clean: .dvc/tmp/exps: found queued experiments running there ({len(queued)}), expected none. "
            "Wait for them (`dvc queue status`), or end them with `dvc queue stop --kill`.",
            file=sys.stderr,
        )
        return 2
    if points := running.at_work():
        print(
            f"clean: runs/sweeps: found points running ({', '.join(points)}), expected none. "
            "Wait for them, or end the `make sweep` or `make search` that runs them with Ctrl-C.",
            file=sys.stderr,
        )
        return 2
    for copy in running.copies():
        running.collect(copy)  # what ended there after its driver was killed
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
