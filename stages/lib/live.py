"""What a training tells the one who started it while it goes on, and the request to stop that it may get.

    runs/<experiment>/live.json   {"losses": [2.31, 1.94], "planned": 4, "stopped_at": null, "reason": ""}
                     /stop        why it should end: written from outside, read after each optimizer step

Files in the user's repository, so that nothing else has to be there; only for experiments, which have a name. A
training that is asked to stop fails (errors.Pruned): a shorter one recorded under its parameters would be false.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.lib import environment, files
from stages.lib.errors import Pruned


@dataclass
class Told:
    """Validation losses of the evaluations so far, nats per labelled token; None for one that is no finite number."""

    losses: list[float | None]
    planned: int  # evaluations, when nothing ends the training early
    stopped_at: int | None = None  # optimizer step at which it did as it was asked
    reason: str = ""  # it was given for that


def start() -> None:
    """Begin with nothing told and nothing asked: what an earlier attempt left must not end this one."""
    if name := os.environ.get("DVC_EXP_NAME"):
        forget(name)


def tell(losses: Sequence[float], planned: int) -> None:
    """Say how a training goes, the whole course each time: a resumed one then tells what came before, too."""
    if name := os.environ.get("DVC_EXP_NAME"):
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        _write(name, Told(finite, planned))


def obey(step: int, steps: int) -> None:
    """Go on unless asked to stop.

    Raises: Pruned, after having said so.
    """
    name = os.environ.get("DVC_EXP_NAME")
    if not name or step == steps or not (request := _folder(name) / "stop").exists():
        return
    told, reason = heard(name) or Told([], 0), request.read_text().strip()
    _write(name, Told(told.losses, told.planned, step, reason))
    raise Pruned(f"stopped at step {step} of {steps}, as it was asked: {reason}. DVC records nothing of it.")


def heard(name: str) -> Told | None:
    """What the training of an experiment has told; None before its first evaluation."""
    path = _folder(name) / "live.json"
    return Told(**files.read_json(path)) if path.exists() else None


def ask_to_stop(name: str, reason: str) -> None:
    with files.replacing(_folder(name) / "stop") as new:
        new.write_text(reason + "\n")


def forget(name: str) -> None:
    """Remove what an earlier attempt told and was asked."""
    for file in ("live.json", "stop"):
        (_folder(name) / file).unlink(missing_ok=True)


def _write(name: str, told: Told) -> None:
    files.write_json(_folder(name) / "live.json", asdict(told))


def _folder(name: str) -> Path:
    return environment.root() / "runs" / name
