"""Run a module in a process of its own: native code that crashes takes only that with it."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stages.lib.errors import ExternalError

CODE = Path(__file__).resolve().parents[2]
FULL = ("No space left on device", "Not enough free space to write")  # the latter is NumPy's, before it writes
LEAST_ROOM = 2**20  # bytes; a disk with less is full
PATIENCE_S = 2 * 3600  # a process that hangs must not hold the pipeline for ever; the default model needs a minute


def run(
    what: str,
    module: str,
    *arguments: str,
    writes: Path | None = None,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a module of the project apart.

    Args: what: is being done, for messages. writes: the file or folder it makes; where it fails and the disk there has
        no room left, that is the fault, whatever a native library calls it.
        python: of the environment it runs in. environment: variables to set.
    Raises: ExternalError, saying what was done, how the process ended, and its last lines; OSError, for a full disk.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [python, "-m", module, *arguments],
                cwd=CODE,  # the code this process runs, not another copy of it
                env={**os.environ, "PIPELINE_ENV": sys.prefix, "TMPDIR": scratch} | dict(environment or {}),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired as fault:
            raise ExternalError(
                f"{what}: no end after {PATIENCE_S} s, the process was ended. Leave the format out of export.formats, "
                "or lower export.answers."
            ) from fault
    if done.returncode == 0:
        return
    said = any(words in done.stderr for words in FULL)
    if said or (writes and shutil.disk_usage(writes.parent).free < LEAST_ROOM):
        raise OSError(errno.ENOSPC, f"No space left on device while {what}")
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with status {done.returncode}"
    last = [line for line in done.stderr.splitlines() if line.strip()][-6:]
    raise ExternalError(f"{what}: the process {how}. Its last lines:\n" + "\n".join(last))
