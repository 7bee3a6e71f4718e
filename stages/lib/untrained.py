"""What does not depend on the training, worked out once for all experiments that share it: the base's answers.

    runs/untrained/<hash of all that determines it>/{base,fewshot,base_16bit,general}.json

A sweep would otherwise let the same base answer the same prompts at every point. They lie in the user's repository
beside the resume points of trainings, not in an output; a fresh clone has none, and works them out again.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from stages.lib import checkpoints, environment, files
from stages.lib.schema.numerics import Determinism, Numerics

log = logging.getLogger(__name__)

OF_TRAINING = ("models/adapter", "plots/train.csv", "data/ratings")
"""What evaluate depends on and the untrained model does not."""


def folder(determining: Mapping[str, Any], n: Numerics) -> Path | None:
    """Where the results of this base, these rows, settings and this code belong; None where a repeat may differ.

    Args: determining: what else they depend on than conf/numerics and what dvc.yaml lists as evaluate's deps.
    """
    if n.determinism is not Determinism.strict:
        return None
    name = checkpoints.key("evaluate", {**determining, "numerics": asdict(n)}, without=OF_TRAINING)
    return environment.root() / "runs" / "untrained" / name


def once(store: Path | None, what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON carries it; read where an earlier experiment left it.

    Of several processes that want it at the same time one works it out and the others wait.
    """
    if store is None:
        return make()
    path = store / f"{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            log.info("%s: as an earlier experiment with the same base, rows and settings found it (%s)", what, path)
        else:
            files.write_json(path, make())
        return files.read_json(path)
