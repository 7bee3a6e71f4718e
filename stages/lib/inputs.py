"""The user's own files, before anything runs: do they exist, and will an experiment find them where it runs?"""

import glob
import subprocess
from pathlib import Path

from stages.lib.errors import ConfigError
from stages.lib.schema.data import Data, Source
from stages.lib.sources import places


def check(data: Data, repository: Path) -> None:
    """Refuse local sources whose files are missing, or that an experiment would not find.

    Raises: ConfigError or DataError, which say what to type.
    """
    for source, settings in data.each().items():
        if settings.source is not Source.local:
            continue
        key, inside = places.origin(data, source)
        if inside is None or Path(settings.path).is_absolute():
            check_visible(settings.path, repository, key=key)
        else:
            check_visible(data.path, repository)
            places.files(settings.path, key=key, inside=repository / inside)


def check_visible(path: str, repository: Path, *, key: str = "data.path") -> None:
    """Refuse a file or folder that is missing, or that an experiment in a temporary copy of the repository lacks.

    Git and DVC carry into that copy what they track; a whole path is the same everywhere on this machine.

    Raises: ConfigError, which says what to type.
    """
    place = repository / path
    if not place.exists() and glob.has_magic(path):
        raise ConfigError(
            f"{key}: found the pattern {path!r}, but DVC depends on a file or a folder. Name the folder, and the "
            "pattern in data.sources: -S data.path=<folder> -S '+data.sources.all={path: \"*.jsonl\"}'"
        )
    if not place.exists():
        raise ConfigError(
            f"{key}: found {path!r}, which does not exist{_pulled(place)}. Expected your own file or folder; a "
            f"relative path starts at the repository: -S {key}=data/raw/my.jsonl"
        )
    if not Path(path).is_absolute() and (unseen := _untracked(Path(path), repository)):
        raise ConfigError(
            f"{key}: found {unseen!r}, which neither git nor DVC tracks: a queued experiment would not find it, nor "
            f"could anybody repeat the run. Type `dvc add {path} && git add {path}.dvc`, or name it by its whole path, "
            f"{place}"
        )


def _pulled(file: Path) -> str:
    return " here but is known to DVC (`dvc pull` brings it)" if file.with_name(f"{file.name}.dvc").exists() else ""


def _untracked(path: Path, repository: Path) -> str | None:
    """The first data file at a path that neither git nor a .dvc file (its own, or of a folder above) has in the index.

    One just added counts.
    """
    names = [str(path), *(f"{part}.dvc" for part in (path, *path.parents))]
    command = ["git", "--literal-pathspecs", "ls-files", "-z", "--", *names]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False).stdout
    tracked = {Path(name) for name in listed.split("\0") if name}

    def is_tracked(file: Path) -> bool:
        parts = (file, *file.parents[:-1])
        return file in tracked or any(part.with_name(f"{part.name}.dvc") in tracked for part in parts)

    if not (repository / path).is_dir():
        return None if is_tracked(path) else str(path)
    held = sorted(file.relative_to(repository) for file in places.below(repository / path))
    return next((str(file) for file in held if not is_tracked(file)), None)
