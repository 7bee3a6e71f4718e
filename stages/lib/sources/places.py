"""Where the files of a local source are: one file, a folder of them, a pattern; and what a name says of its content."""

import glob
import os
from pathlib import Path, PurePosixPath

from stages.lib import environment
from stages.lib.errors import ConfigError, DataError
from stages.lib.schema.data import Data

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
EXPECTED = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"

Place = tuple[Path, str]  # a file, and its name in messages and records


def kind(name: str) -> tuple[str, str | None] | None:
    """What the name says of a file: chats.jsonl.gz -> (jsonl, gzip), chats.csv -> (csv, None), README.md -> None."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    found = KINDS.get(path.with_suffix("").suffix if compression else path.suffix)
    return (found, compression) if found else None


def files(path: str, *, key: str = "data.path", inside: Path | None = None) -> list[Place]:
    """The files of a source, sorted by name; in a folder and for a pattern, those of the known kinds.

        path              inside     gives
        raw/my.jsonl                 my.jsonl
        raw                          a.jsonl, more/b.csv.gz       every file below it but the hidden ones
        raw/**/*.csv                 more/b.csv                   named from the last folder without a pattern
        more/b.csv        raw        more/b.csv                   an entry of data.sources, below data.path

    Args: path: relative ones start at the working folder, with `inside` there. key: the configuration's, for messages.
    Raises: DataError, when nothing is there; ConfigError, when a path of `inside` or a link leads out of its folder.
    """
    if inside is None or Path(path).is_absolute():
        base, whole = None, Path(path)
    else:
        base, whole = inside, inside / path
        if not Path(os.path.normpath(whole)).is_relative_to(os.path.normpath(inside)):
            raise ConfigError(
                f"{key}: found {path!r}, which leaves {inside}. Expected a path below it, or a whole path."
            )
        if not inside.is_dir():
            raise ConfigError(
                f"{key}: found {path!r}, expected data.path to be the folder that holds it, found {str(inside)!r}. "
                "Change data.path, or write the whole path."
            )
    if whole.is_dir():
        base, found = base or whole, below(whole)
    elif not whole.exists() and glob.has_magic(path):
        base = base or _fixed_part(whole)
        found = sorted(Path(name) for name in glob.glob(str(whole), recursive=True) if kind(name))
        found = [file for file in found if file.is_file()]
    else:
        found = [whole]
    if not found:
        raise DataError(f"{path}: holds no file of a known kind, expected {EXPECTED}. Change {key}.")
    if not found[0].exists():
        raise DataError(f"{whole.name}: not found. {_where_it_should_be(whole, key)}")
    if base is None:
        return [(file, file.name) for file in found]
    for file in found:
        if file.is_dir() or not file.resolve().is_relative_to(base.resolve()):
            raise ConfigError(
                f"{key}: {file.relative_to(base)} is a link to a folder or out of {base}, whose content may change "
                f"unnoticed. Copy the files into {base}."
            )
    return sorted(((file, file.relative_to(base).as_posix()) for file in found), key=lambda place: place[1])


def origin(data: Data, source: str) -> tuple[str, Path | None]:
    """(key that names a local source's files, folder in which a relative path of it starts) of a name in `each()`."""
    if source and "path" in data.sources[source]:
        return f"data.sources.{source}.path", Path(data.path)
    return "data.path", None


def below(folder: Path) -> list[Path]:
    """All files of known kinds below a folder, and links to folders; what is hidden holds no data."""
    return [
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and (file.is_symlink() if file.is_dir() else kind(file.name))
    ]


def _fixed_part(pattern: Path) -> Path:
    """raw/2024-*/*.csv -> raw."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _where_it_should_be(path: Path, key: str) -> str:
    user_copy = environment.root() / path
    if not path.is_absolute() and environment.root() != Path.cwd().resolve() and user_copy.exists():
        return (
            "It lies in your working copy, but a queued run sees only what git or DVC tracks. Type "
            f"`dvc add {path} && git add {path}.dvc`, or name it by its whole path: -S {key}={user_copy}"
        )
    return f"Expected the file that {key} names; a relative path starts at the repository. Change {key}."
