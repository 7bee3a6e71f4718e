"""Print where params.yaml, which `dvc repro` runs as it is, differs from the composed defaults of conf/."""

import sys
from typing import Any

from omegaconf import OmegaConf

from commands.params import FAULTS, PARAMS, composed
from stages.lib.config import flat


def differences(found: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """One line for each key whose value differs, or that only one side has."""
    left, right = flat(found), flat(defaults)
    absent = "(absent)"
    return [
        f"{key}: {left.get(key, absent)} in {PARAMS}, {right.get(key, absent)} in conf/"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, absent) != right.get(key, absent)
    ]


def main() -> int:
    try:
        defaults = composed()
    except FAULTS as fault:
        print(f"differences: conf/ does not compose: {fault}", file=sys.stderr)
        return 2
    found: Any = OmegaConf.to_container(OmegaConf.load(PARAMS))
    if lines := differences(found, defaults):
        print(f"{PARAMS} is not the composed defaults; `make params` writes those. It runs with:")
        print("\n".join(f"  {line}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
