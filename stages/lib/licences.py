"""The base model's licence goes where its weights go: its own text, and what it wants every copy to say."""

import shutil
from pathlib import Path

FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")
"""Names of such files in a model folder; one from a registry package is laid down as LICENSE, with its own suffix."""


def carry(base: Path, folder: Path) -> list[str]:
    """Copy them out of models/base; the licence's own text as BASE_LICENSE, beside the folder's own LICENSE.md.

    Returns: the names of the copies, sorted.
    """
    names = []
    for path in sorted(path for pattern in FILES for path in base.glob(pattern)):
        name = f"BASE_{path.name}" if path.name.startswith("LICENSE") else path.name
        shutil.copyfile(path, folder / name)
        names.append(name)
    return sorted(names)
