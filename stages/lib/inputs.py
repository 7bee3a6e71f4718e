"""The user's own file, before anything runs: does it exist, and will an experiment find it where it runs?"""

import subprocess
from pathlib import Path

from stages.lib.errors import ConfigError


def check_visible(path: str, repository: Path) -> None:
    """Refuse a data file that is missing, or that an experiment in a temporary copy of the repository would not find.

    Git and DVC carry into that copy what they track; a whole path is the same file everywhere on this machine.

    Raises: ConfigError, which says what to type.
    """
    file = repository / path
    if not file.exists():
        raise ConfigError(
            f"data.path: found {path!r}, which does not exist{_pulled(file)}. Expected your own file; a relative path "
            "starts at the repository: -S data.path=data/raw/my.jsonl"
        )
    if not Path(path).is_absolute() and not _is_tracked(Path(path), repository):
        raise ConfigError(
            f"data.path: found {path!r}, which neither git nor DVC tracks: a queued experiment would not find it, nor "
            f"could anybody repeat the run. Type `dvc add {path} && git add {path}.dvc`, or name it by its whole path, "
            f"{file}"
        )


def _pulled(file: Path) -> str:
    return " here but is known to DVC (`dvc pull` brings it)" if file.with_name(f"{file.name}.dvc").exists() else ""


def _is_tracked(path: Path, repository: Path) -> bool:
    """Whether git has in its index the file, or the .dvc file of it or of a folder above; one just added counts."""
    names = [str(path), *(f"{part}.dvc" for part in (path, *path.parents))]
    command = ["git", "--literal-pathspecs", "ls-files", "--", *names]
    return bool(subprocess.run(command, cwd=repository, capture_output=True, check=False).stdout)
