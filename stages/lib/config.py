"""The one path of configuration: conf/ -> params.yaml (composed by DVC) -> the stage's typed Params.

A stage never composes conf/ itself: it would ignore what `dvc exp run -S` wrote into params.yaml.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.lib.errors import ConfigError

P = TypeVar("P")


def load(schema: type[P], overrides: Sequence[str] = (), path: Path = Path("params.yaml")) -> P:
    """Read params.yaml, apply command-line overrides (`lora.r=8`), and check both against the schema.

    Args: schema: a dataclass whose fields are top-level keys of params.yaml; only those are read.
    Raises: ConfigError, for a missing file, an unknown key, a wrong type, a missing value or a value out of range.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, schema))]
    with _faults_of(path):
        found = _composed(path, overrides)
        known = OmegaConf.masked_copy(found, [name for name in names if name in found])
        return cast(P, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), known)))


def values(overrides: Sequence[str] = (), path: Path = Path("params.yaml")) -> dict[str, Any]:
    """The whole of params.yaml with command-line overrides, as nested plain values, unchecked.

    Raises: ConfigError, for a missing file, or an override of a key that is not there.
    """
    with _faults_of(path):
        return cast(dict[str, Any], OmegaConf.to_container(_composed(path, overrides)))


def _composed(path: Path, overrides: Sequence[str]) -> DictConfig:
    if not path.exists():
        raise ConfigError(f"{path}: not found, expected the composed configuration. Type `make params`.")
    with initialize_config_dir(str(path.resolve().parent), version_base=None):
        return compose(path.stem, overrides=list(overrides))


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one ConfigError; the schema's own stays as it is."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as fault:
        if isinstance(cause := fault.__cause__, ConfigError):
            raise cause from None
        raise ConfigError(f"{path}: {str(fault).strip()}") from fault


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: {"lora": {"r": 16}} -> {"lora.r": 16}. Lists stay values."""
    if not isinstance(values, dict):
        return {prefix: values}
    merged: dict[str, Any] = {}
    for key, value in values.items():
        merged |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return merged
