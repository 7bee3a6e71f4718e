"""The types of every configuration key, known to Hydra while DVC composes conf/ into params.yaml.

Hydra imports this folder by itself (a namespace package: no __init__.py) when the repository is on sys.path. With the
schema first in the defaults list, an unknown key or a wrong type fails before any output is touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from stages.lib import environment, inputs
from stages.lib.errors import ConfigError
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data
from stages.lib.schema.dedup import Dedup
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.export import Export
from stages.lib.schema.lora import Lora, check_together
from stages.lib.schema.merge import Merge
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.pack import Pack
from stages.lib.schema.prompt import Prompt
from stages.lib.schema.runtime import Runtime, check_launcher
from stages.lib.schema.split import Split
from stages.lib.schema.sweep import Sweep
from stages.lib.schema.train import Train, check_optimizer, check_processes


@dataclass
class Config:
    base_model: BaseModel
    data: Data
    prompt: Prompt
    dedup: Dedup
    split: Split
    pack: Pack
    lora: Lora
    train: Train
    evaluate: Evaluate
    merge: Merge
    export: Export
    numerics: Numerics
    runtime: Runtime
    sweep: Sweep
    seed: int
    checked: str


def unknown(found: Mapping[Any, Any], schema: Any, prefix: str = "") -> list[str]:
    """One line for each key of a section, and of those inside it, that its dataclass does not have."""
    known = {field.name: field.type for field in fields(schema)}
    lines = [
        f"{prefix}{key}: found {found[key]!r}, expected no such key; there are {', '.join(sorted(known))}"
        for key in found
        if key not in known
    ]
    for key, kind in known.items():
        if is_dataclass(kind) and key in found:
            lines += unknown(found[key], kind, f"{prefix}{key}.")
    return lines


def check(*, _root_: DictConfig) -> str:
    """Build every section's dataclass, which checks its own ranges; DVC resolves this while it composes.

    A key that `-S +lora.new=1` appends has passed Hydra's own check; it is refused here, else nothing would read it.
    The user's file is looked for as well: DVC itself would only say "No such file", after the outputs are gone.

    Raises: errors.ConfigError, naming the keys.
    """
    if lines := unknown(_root_, Config):
        raise ConfigError("\n".join(lines))
    sections: Any = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "checked"])
    built: Any = OmegaConf.to_object(sections)
    check_sections(built["lora"], built["train"], built["numerics"])
    check_launcher(built["runtime"].launcher, built["train"].processes)
    inputs.check(built["data"], environment.root())
    benchmarks = built["dedup"].contamination.benchmarks
    inputs.check_visible(benchmarks, environment.root(), key="dedup.contamination.benchmarks")
    return "while composed"


def check_sections(lora: Lora, train: Train, numerics: Numerics) -> None:
    """What sections ask of each other, as far as it is known without the model and its device.

    Raises: errors.ConfigError, naming the keys.
    """
    check_together(lora, numerics, gradient_checkpointing=train.gradient_checkpointing)
    check_optimizer(train, str(numerics.device))
    check_processes(train, lora, numerics, str(numerics.device))


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("check", check, replace=True)
