"""Params of quantize_export for the tiny trained model of tests/exported.py."""

from typing import Any

import yaml

from stages import quantize_export
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Source
from stages.lib.schema.export import Export, Format
from tests import evaluate_settings
from tests.conftest import ROOT
from tests.data_settings import settings
from tests.exported import MERGE, NUMERICS

NAME = "llama-tuned"
FORMATS = [Format.gguf_f16, Format.gguf_q8_0, Format.gguf_q4_k_m, Format.bnb_nf4]


def params(**export: Any) -> quantize_export.Params:
    """Those, with other values in section `export`."""
    values: dict[str, Any] = {
        "formats": FORMATS,
        "max_kl": {"gguf_f16": 1e-3, "gguf_q8_0": 1e-2},
        "min_stopped": 0.9,
        "rows": 4,
        "chats": 5,
        "answers": {"gguf_q8_0": 6},
        "probes": 2,
        "sbom": False,
        "gguf_pre_tokenizer": "gpt-2",
        "imatrix_rows": 0,
    }
    base = yaml.safe_load((ROOT / "conf/base_model/smollm2_135m.yaml").read_text()) | {"id": "tiny/llama"}
    return quantize_export.Params(
        base_model=BaseModel(**base),
        data=settings(source=Source.python_docs, packages=["numpy"]),
        evaluate=evaluate_settings.settings(max_new_tokens=8, bootstrap_samples=100, fewshot=1),
        export=Export(**values | export),
        merge=MERGE,
        numerics=NUMERICS,
    )
