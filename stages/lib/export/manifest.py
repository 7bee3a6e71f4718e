"""models/export/manifest.json: what the folder holds and what it was made from, by sha256."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib import files
from stages.lib.errors import DataError

NAME = "manifest.json"


def write(
    folder: Path,
    *,
    base: Mapping[str, Any],
    adapter: Path,
    splits: Path,
    formats: Mapping[str, Any],
    recommended: str | None = None,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Name every file of the folder and everything the weights come from. No time, host, path, commit or run id.

    Args: base: models/base/source.json. formats: what was measured of each format. recommended: the GGUF file to serve.
        skipped: formats that were asked for and not written, with the reason.
    """
    files.write_json(
        folder / NAME,
        {
            "base": {key: base[key] for key in sorted(base)},
            "adapter": _digests(adapter),
            "data": _digests(splits),
            "formats": dict(formats),
            "skipped": dict(skipped or {}),
            "recommended": recommended,
            "files": _digests(folder),
        },
    )


def verify(folder: Path) -> None:
    """Hold the folder to its manifest.

    Raises: DataError, naming the files that are missing, unknown or changed.
    """
    recorded, found = files.read_json(folder / NAME)["files"], _digests(folder)
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    if wrong:
        raise DataError(
            f"{folder}: {len(wrong)} files are not as {NAME} says: {', '.join(wrong[:5])}. Run quantize_export again."
        )


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}
