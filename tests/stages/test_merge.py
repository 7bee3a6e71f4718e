"""merge: one folder that stands alone, measured against 4-bit base + adapter, or nothing at all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages import merge
from stages.lib import files, merging
from stages.lib.errors import ConfigError, GateError
from stages.lib.schema.merge import Base, Dtype
from tests.evaluate_settings import settings
from tests.exported import MERGE, NUMERICS, make_inputs

PARTS = ("delta", "low", "high")


def params(**changes: Any) -> merge.Params:
    return merge.Params(settings(max_new_tokens=4), replace(MERGE, dtype=Dtype.float16, **changes), NUMERICS)


@pytest.fixture
def inputs(in_tmp: Path, tiny_model_dir: Path) -> Path:
    make_inputs(tiny_model_dir)
    return in_tmp


def test_merge_writes_the_trained_model_and_the_same_bytes_again(inputs: Path) -> None:
    digests = []
    for _ in range(2):
        merge.main(params())
        digests.append({path.name: files.sha256(path) for path in Path("models/merged").iterdir()})
    assert digests[0] == digests[1]
    metrics = files.read_json(Path("metrics/merge.json"))
    assert metrics["merge/kl/mean"] < 1e-6 < metrics["merge/16bit/kl/mean"]
    measures = {f"task/{name}/{part}" for name in ("parameters/field_f1", "summary/rouge_l") for part in PARTS}
    figures = {"kl/mean", "kl/p99", "top1", "perplexity", "perplexity_ratio"}
    assert metrics.keys() == {"merge/tokens", "merge/mib"} | {
        f"{stem}/{name}" for stem in ("merge", "merge/16bit") for name in figures | measures
    }


def test_the_original_base_is_near_to_the_16_bit_model_and_far_from_the_one_that_was_trained(inputs: Path) -> None:
    merge.main(params(base=Base.original, max_kl=10))
    metrics = files.read_json(Path("metrics/merge.json"))
    assert metrics["merge/kl/mean"] > 10 * metrics["merge/16bit/kl/mean"]


@pytest.fixture
def earlier(inputs: Path) -> Callable[[], bool]:
    """A merge of before; says whether it is still there, and nothing beside it."""
    Path("models/merged").mkdir()
    Path("models/merged/model.safetensors").write_bytes(b"earlier")

    def is_left() -> bool:
        names = [path.name for path in Path("models").iterdir() if "merged" in path.name]
        return names == ["merged"] and Path("models/merged/model.safetensors").read_bytes() == b"earlier"

    return is_left


def test_a_merge_beyond_the_bound_leaves_the_last_one_in_place(earlier: Callable[[], bool]) -> None:
    with pytest.raises(GateError, match=r"mean KL .* expected at most 1e-12.*\n?.*merge.max_kl"):
        merge.main(params(max_kl=1e-12))
    assert earlier()


def test_a_damaged_layer_breaks_the_gate(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merging.merge

    def damaged(*arguments):  # type: ignore[no-untyped-def]
        model = whole(*arguments)
        model.get_submodule("model.layers.1.mlp.down_proj").weight.data.zero_()
        return model

    monkeypatch.setattr(merging, "merge", damaged)
    with pytest.raises(GateError, match="mean KL"):
        merge.main(params())
    assert not Path("models/merged").exists()


def test_a_full_disk_leaves_the_last_merge_in_place(
    earlier: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments):  # type: ignore[no-untyped-def]
        Path("models/merged.partial").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "save", full)
    with pytest.raises(OSError, match="No space left"):
        merge.main(params())
    assert earlier()


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_are_refused_before_a_model_is_loaded(in_tmp: Path, method: str) -> None:
    Path("models/adapter").mkdir(parents=True)
    files.write_json(Path("models/adapter/adapter_config.json"), {"peft_type": method})
    with pytest.raises(ConfigError, match=rf"{method.lower()}.*cannot be merged.*dvc repro evaluate"):
        merge.main(params())
