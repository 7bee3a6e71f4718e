"""Base models without their weights: of the folder models/base, or, before it is there, by name."""

import functools
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedModel

from stages.lib import estimate, files
from stages.lib.errors import ConfigError

KNOWN = Path(__file__).with_suffix(".yaml")


def of(name: str, folder: Path = Path("models/base")) -> PreTrainedModel:
    """The base of this name: as it lies in the folder, if it is the one that does, else as it is known.

    Raises: ConfigError, when neither is.
    """
    source = folder / "source.json"
    if source.exists() and files.read_json(source)["id"] == name:
        return estimate.skeleton(folder)
    if name not in known():
        raise ConfigError(
            f"base_model.id: found {name}, of which neither {folder} nor {KNOWN.name} knows the shape. Expected one of "
            f"{', '.join(sorted(known()))}; or fetch it first: `dvc exp run -S base_model=... base_model`."
        )
    return by_name(name)


@functools.cache
def by_name(name: str) -> PreTrainedModel:
    """A base of the list, without weights."""
    shape = dict(known()[name])
    return estimate.without_weights(AutoConfig.for_model(shape.pop("model_type"), **shape))


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """Configurations by base_model.id."""
    return dict(yaml.safe_load(KNOWN.read_text(encoding="utf-8")))
