"""Steps, work and time of a training, against figures one can check by hand and those that authors state."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages import qlora_train
from stages.lib import config, cost, estimate, packing
from stages.lib.estimate import Range
from stages.lib.experiments import shapes
from stages.lib.schema.lora import Method
from tests.conftest import ROOT

DEFAULTS = config.load(qlora_train.Params, path=ROOT / "params.yaml")
STATED = {  # billions of parameters, by the models' authors
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345, "HuggingFaceTB/SmolLM2-360M-Instruct": 0.3618,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.711, "google/gemma-3-270m": 0.268, "google/gemma-3-270m-it": 0.268,
    "google/gemma-3-1b-it": 1.0, "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-4B-Instruct-2507": 4.02, "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.8, "Qwen/Qwen3-32B": 32.8, "mistralai/Mistral-7B-Instruct-v0.3": 7.25,
    "meta-llama/Llama-3.2-1B-Instruct": 1.236, "meta-llama/Llama-3.2-3B-Instruct": 3.213,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03, "meta-llama/Llama-3.1-70B-Instruct": 70.55, "Qwen/Qwen-1_8B-Chat": 1.84,
    "Qwen/Qwen-7B-Chat": 7.72, "Qwen/Qwen-14B-Chat": 14.17, "Qwen/Qwen-72B-Chat": 72.29,
}  # fmt: skip


def test_every_known_shape_has_the_parameters_its_authors_state() -> None:
    found = {name: sum(p.numel() for p in shapes.by_name(name).parameters()) / 1e9 for name in shapes.known()}
    assert found == pytest.approx(STATED, rel=0.005)


def test_the_work_of_a_token_is_counted_by_hand(tiny_model_dir: Path) -> None:
    model = estimate.skeleton(tiny_model_dir)
    layers = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 512)  # q, k and v, o, the MLP's three
    adapter = 2 * 8 * (512 + 2 * 384 + 512 + 3 * 768)
    head = model.get_output_embeddings().weight.numel()
    found = cost.work(model, replace(DEFAULTS.lora, r=8), 0.25)
    assert found.useful() == 4 * layers + 6 * adapter + 4 * 0.25 * head
    again = cost.work(model, replace(DEFAULTS.lora, r=8), 0.25, gradient_checkpointing=True)
    assert again.step() - again.useful() == 2 * (layers + adapter)
    whole = cost.work(model, replace(DEFAULTS.lora, method=Method.full), 0.0)
    assert whole.useful() == 6 * layers


@pytest.mark.parametrize(
    ("changes", "steps", "tokens"),
    [
        ({}, 4, 700),  # 7 packs, two at a time
        ({"gradient_accumulation_steps": 3}, 2, 700),
        ({"epochs": 2.0}, 8, 1400),
        ({"epochs": 0.5}, 2, 350),
        ({"batch_size": 16}, 1, 700),
    ],
    ids=str,
)
def test_steps_are_those_of_the_trainer(changes: dict[str, float], steps: int, tokens: int) -> None:
    found = cost.plan(cost.Tokens(7, 700, 70), replace(DEFAULTS.train, **changes))
    assert (found.steps, found.tokens, found.labelled) == (steps, tokens, tokens // 10)


def test_twice_the_tokens_take_twice_as_long_and_a_faster_device_less(tiny_model_dir: Path) -> None:
    def seconds(tokens: int, limit: float, **changes: object) -> Range:
        model, train = estimate.skeleton(tiny_model_dir), replace(DEFAULTS.train, samples=0, **changes)
        split, nothing = cost.Tokens(4, tokens, tokens // 4), cost.Tokens(0, 0, 0)
        return cost.seconds(model, DEFAULTS.lora, train, split, nothing, device="cpu", limit=limit)

    once = seconds(1000, 1e9)
    assert seconds(2000, 1e9).expected == pytest.approx(2 * once.expected)
    assert seconds(1000, 2e9).expected == pytest.approx(once.expected / 2)
    assert seconds(1000, 1e9, gradient_checkpointing=True).expected > once.expected
    assert once.low < once.expected < once.high


def test_labels_of_packs_are_counted() -> None:
    pack = packing.Pack(
        input_ids=[1] * 5, position_ids=[0, 1, 2, 0, 1], labels=[-100, 7, 7, -100, 7], row_ids=["a", "b"]
    )
    assert cost.Tokens.of([pack, pack]) == cost.Tokens(packs=2, tokens=10, labelled=6)


def test_an_estimate_is_set_beside_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    expected = cost.Expected(Range(1, 90 * 2**20, 1e9), Range(1, 60, 100), 3e11)
    measured = {"train/peak_memory_mib": 100, "train/seconds": 50.0, "train/steps_in_full": 1}
    found = expected.beside(measured)
    assert (found["estimate/memory_error"], found["estimate/seconds_error"]) == (-0.1, 0.2)
    assert "estimated 60 s, measured 50 s (+20%)" in capsys.readouterr().out


def test_the_time_of_a_training_that_went_on_from_another_is_not_compared() -> None:
    expected = cost.Expected(Range(1, 90 * 2**20, 1e9), Range(1, 60, 100), 3e11)
    found = expected.beside({"train/peak_memory_mib": 100, "train/seconds": 5.0, "train/steps_in_full": 0})
    assert "estimate/seconds_error" not in found
