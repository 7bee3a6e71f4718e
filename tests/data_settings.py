"""The section `data` as conf/shared gives it, for tests of what reads it."""

from typing import Any

import yaml

from stages.lib.schema.data import Clean, Data, Noise, Source
from tests.conftest import ROOT


def settings(**changes: Any) -> Data:
    """A local source, with these keys changed."""
    values = yaml.safe_load((ROOT / "conf/shared/data.yaml").read_text()) | {"source": Source.local} | changes
    return Data(**values | {"clean": Clean(**values["clean"]), "noise": Noise(**values["noise"])})
