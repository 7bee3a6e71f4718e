"""The section `evaluate` as conf/evaluate gives it, small, for tests of what reads it."""

from typing import Any

from omegaconf import OmegaConf

from stages.lib.schema.evaluate import Evaluate
from tests.conftest import ROOT


def settings(**changes: Any) -> Evaluate:
    """The defaults with few resamples, no general text and no 16-bit base, and with these keys changed."""
    small = {"bootstrap_samples": 200, "base_16bit": False, "general_text": {"package": None}}
    found = OmegaConf.merge(
        OmegaConf.structured(Evaluate), OmegaConf.load(ROOT / "conf/evaluate/three_arms.yaml"), small, changes
    )
    evaluate: Any = OmegaConf.to_object(found)
    assert isinstance(evaluate, Evaluate)
    return evaluate
