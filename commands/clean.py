"""make clean: free the disk of what can be made again: cached outputs no branch or experiment uses, temporary runs."""

import shutil
import subprocess
import sys
from pathlib import Path


def main() -> int:
    for folder in (*Path(".dvc/tmp/exps").glob("tmp*"), Path("dvc_plots")):
        shutil.rmtree(folder, ignore_errors=True)
    command = ["dvc", "gc", "--workspace", "--all-branches", "--all-experiments", "--force"]
    print(" ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
