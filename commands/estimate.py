"""make estimate: what a training will take, from the configuration alone: make estimate [ARGS="lora.r=8 ..."]

    python -m commands.estimate [lora.r=8 experiment=gpu_24gb ...] [--device rtx_4090] [--price 0.44]
    python -m commands.estimate --table > docs/estimates.md

Trainable parameters, steps, tokens, memory by part, time, cost, the stages that would run, and how far off earlier
estimates on this machine were. Overrides are those of `dvc exp run -S`.
Exit 0: it fits; 1: it does not; 2: it cannot be estimated.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from commands.params import FAULTS, composed
from stages.lib import numerics
from stages.lib.errors import ConfigError, PipelineError
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.runtime import Runtime

UNPINNED = "base_model.revision=" + 40 * "0"  # the shape of a base does not depend on which commit it is


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="estimate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("overrides", nargs="*", help="as for `dvc exp run -S`: lora.r=8, base_model=qwen3_8b")
    known.add_argument("--device", default="here", help="this machine (here), or a card: rtx_4090, a100_80gb, ...")
    known.add_argument("--price", type=float, help="of an hour of the device; any currency")
    known.add_argument("--rows", type=int, help="of the training split, where the data is not there yet")
    known.add_argument("--tokens", type=float, help="in a row, on average")
    known.add_argument(
        "--table", action="store_true", help="print docs/estimates.md: models of 1B to 70B on common cards"
    )
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)  # of the libraries only what a user can act on
    try:
        if asked.table:
            from stages.lib.experiments import estimate_page

            print(estimate_page.table(), end="")
            return 0
        params = configured(asked.overrides)
        return told(params, asked)
    except PipelineError as fault:
        print(f"estimate: {fault}", file=sys.stderr)
    return 2


def configured(overrides: list[str]) -> dict[str, Any]:
    """What `dvc exp run` would compose; of a base that is not pinned yet, with a commit in its place.

    Raises: ConfigError, where conf/ does not compose.
    """
    for extra in ([], [UNPINNED]):
        try:
            return composed([*overrides, *extra])
        except FAULTS as fault:
            if "base_model.revision" not in str(fault) or extra:
                raise ConfigError(f"conf/ does not compose: {fault}") from fault
    raise AssertionError


def told(params: dict[str, Any], asked: argparse.Namespace) -> int:
    numerics.settle(typed(Numerics, params["numerics"]), typed(Runtime, params["runtime"]).threads)
    from stages.lib.experiments import devices, estimate_page, foreseeing, outdated, shapes  # torch, once settled

    p = foreseeing.Params(
        **{name: typed(kind, params[name]) for name, kind in foreseeing.Params.__annotations__.items()}
    )
    model = shapes.of(p.base_model.id)
    data = foreseeing.data_of(params, rows=asked.rows, tokens=asked.tokens)
    if asked.device == devices.HERE:
        device = devices.here(model, numerics.resolve(p.numerics), p.train.batch_size * p.pack.max_tokens)
    else:
        device = devices.named(asked.device)
    found = foreseeing.foresee(model, p, data, device)
    print(estimate_page.text(p, found, data, device, price=asked.price))
    print(estimate_page.stages(outdated.stages(params)))
    if record := estimate_page.record(Path("runs"), params):
        print(record)
    return 1 if found.verdict(device) == "does not fit" else 0


def typed(schema: Any, values: Any) -> Any:
    """A section of composed parameters as its schema."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


if __name__ == "__main__":
    sys.exit(main())
