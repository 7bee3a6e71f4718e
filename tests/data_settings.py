"""The section `data` as conf/shared gives it, for tests of what reads it."""

from typing import Any

from omegaconf import OmegaConf

from stages.lib.schema.data import Data
from tests.conftest import ROOT


def settings(**changes: Any) -> Data:
    """A local source, with these keys changed."""
    found = OmegaConf.merge(
        OmegaConf.structured(Data), OmegaConf.load(ROOT / "conf/shared/data.yaml"), {"source": "local"}, changes
    )
    data: Any = OmegaConf.to_object(found)
    assert isinstance(data, Data)
    return data
