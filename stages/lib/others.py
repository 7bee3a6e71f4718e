"""Adapters and models from elsewhere, to compare with or to merge: told apart by what they hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib import files
from stages.lib.errors import ModelError


def check(others: Mapping[str, Mapping[str, Any]], section: str = "evaluate.others") -> None:
    """Refuse folders that are missing or hold something else than was configured, before anything is computed.

    Args: section: the key they are configured under.
    Raises: ModelError, with the sha256 of what was found.
    """
    faults = []
    for name, entry in sorted(others.items()):
        key, folder = f"{section}.{name}", Path(entry["path"])
        if not (is_adapter(folder) or (folder / "config.json").is_file()):
            faults.append(
                f"{key}.path: found {str(folder)!r}, expected a folder with adapter_config.json (an adapter of "
                "models/base) or config.json (a model)"
            )
        elif (found := sha256(folder)) != entry["sha256"]:
            faults.append(
                f"{key}.sha256: found {entry['sha256']!r}, but the files of {folder} have {found}. If they are the "
                f"ones you mean: -S {key}.sha256={found}"
            )
    if faults:
        raise ModelError("\n".join(faults))


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def sha256(folder: Path) -> str:
    """Hex digest over the names and contents of all files below a folder."""
    held = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{files.sha256(folder / name)}  {name}\n" for name in held)
    return hashlib.sha256(lines.encode()).hexdigest()
