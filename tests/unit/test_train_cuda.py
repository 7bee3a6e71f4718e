"""bench.train_cuda where there is no GPU: it says so; and what it measures with, on a tiny shape."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import train_cuda
from stages.lib import config
from tests.conftest import ROOT

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape") / "base"
    train_cuda.build(folder, TINY, seed=0)
    return folder


@pytest.fixture
def p() -> train_cuda.Params:
    overrides = ["pack.max_tokens=32", "numerics.device=cpu", "train.warmup_ratio=0"]
    return config.load(train_cuda.Params, overrides, path=ROOT / "params.yaml")


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["bench.train_cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_cuda.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no GPU here; nothing was measured" in line


def test_the_built_base_is_a_whole_model_of_random_weights(base: Path) -> None:
    model, told = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, output_loading_info=True)
    assert not any(told.values())
    assert all(float(weight.detach().std()) > 0.01 for weight in model.parameters() if weight.dim() > 1)


def test_the_summary_sets_medians_beside_each_other_and_names_who_is_missing() -> None:
    stage = {"tokens_per_second": 300.0, "gflop_per_token": 2.0, "peak_gib": 10.0}
    found = {
        "stage": [stage, stage | {"tokens_per_second": 500.0}],
        "trl": [{"tokens_per_second": 200.0, "peak_gib": 20.0}] * 2,
        "unsloth": [{"missing": "ModuleNotFoundError: no unsloth"}],
        "limit": [{"gflop_per_second": 1000.0}, {"gflop_per_second": 3000.0}],
    }
    line = train_cuda.summary(found)
    assert (line["tokens_per_second"], line["ratio_to_trl"], line["share_of_limit"]) == (400.0, 2.0, 0.4)
    assert line["ratio_to_unsloth"] is None
    assert line["missing"] == {"unsloth": "ModuleNotFoundError: no unsloth"}


@pytest.mark.slow
def test_stage_trl_and_limit_are_measured_on_the_same_work(base: Path, p: train_cuda.Params) -> None:
    p = replace(p, train=replace(p.train, learning_rate=0.01))
    for found in (train_cuda.train_as_the_stage(base, p, 4), train_cuda.train_with_trl(base, p, 4)):
        assert found["tokens_per_second"] > 0
        assert math.isnan(found["peak_gib"]) or found["peak_gib"] > 0
    assert train_cuda.matrix_product_limit(base, p)["gflop_per_second"] > 0
