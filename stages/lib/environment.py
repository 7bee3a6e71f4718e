"""Which python runs the stages, and where the project's own repository is."""

import os
import sys
from pathlib import Path


def root() -> Path:
    """The user's repository: DVC names it in DVC_ROOT, also while an experiment runs in a temporary copy of it.

    PIPELINE_ROOT goes before: DVC starts the points of a sweep from a copy, too. Outside of both it is the nearest
    folder upwards that DVC knows, or the working folder.
    """
    if named := os.environ.get("PIPELINE_ROOT") or os.environ.get("DVC_ROOT"):
        return Path(named).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def fault() -> str | None:
    """Why this python must not run a stage, in one line; None when it may.

    The environment is `.venv` of the repository, or the one that PIPELINE_ENV names (a container, a cluster's module).
    """
    expected = Path(os.environ.get("PIPELINE_ENV") or root() / ".venv").resolve()
    found = Path(sys.prefix).resolve()
    if found == expected:
        return None
    return (
        f"python of {found} runs a stage, expected the one of {expected}. "
        "Type `make env`, then put .venv/bin first on PATH (make does), or name another environment in PIPELINE_ENV."
    )
