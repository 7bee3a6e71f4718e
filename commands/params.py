"""make params: compose conf/ as `dvc exp run` does and write params.yaml, the defaults that are committed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

PARAMS = Path("params.yaml")
FAULTS = (HydraException, OmegaConfBaseException, YAMLError)
"""How composition refuses what stands in conf/."""


def composed(overrides: Sequence[str] = (), folder: Path = Path("conf")) -> dict[str, Any]:
    """The configuration DVC would write, by DVC's own function, as nested dictionaries.

    Raises: one of FAULTS, as `dvc exp run` reports them.
    """
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / PARAMS.name
        write(path, overrides, folder)
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(values)


def write(path: Path, overrides: Sequence[str] = (), folder: Path = Path("conf")) -> None:
    """Compose and write, by DVC's own function: what `dvc exp run` would write, to the byte."""
    compose_and_dump(path, str(folder.resolve()), None, "config", str(Path.cwd()), list(overrides))


def main() -> int:
    try:
        write(PARAMS, sys.argv[1:])
    except FAULTS as fault:
        print(f"params: conf/ does not compose: {fault}", file=sys.stderr)
        return 2
    print(f"params: {PARAMS} holds the composed defaults; commit it with conf/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
