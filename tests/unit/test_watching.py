"""What is seen and decided while a training runs: the best adapter, early stopping, broken runs, curves, samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib import adapters, chat, training
from stages.lib.errors import GateError
from tests.tiny_training import TRAIN, fit


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return chat.load_tokenizer(tiny_model_dir)


Adapter = dict[str, torch.Tensor]


def scripted(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Adapter, float]]:
    """Let validation find these losses, the first one for the base, and the same again for an adapter that it knows.

    Returns: the adapters met and their losses.
    """
    seen: list[tuple[Adapter, float]] = []
    rest = iter(losses)

    def validation_loss(trainer: training.PackedTrainer, *, with_adapter: bool = True) -> float:
        here = {name: value.detach().clone() for name, value in adapters.trainable(trainer.model).items()}
        for adapter, loss in seen:
            if all(torch.equal(adapter[name], value) for name, value in here.items()):
                return loss
        seen.append((here, next(rest)))
        return seen[-1][1]

    monkeypatch.setattr(training.PackedTrainer, "validation_loss", validation_loss)
    return seen


def test_the_best_checkpoint_is_kept_and_not_a_number_never_wins(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted([5.0, 3.0, float("nan"), 4.0], monkeypatch)
    trained, adapter = fit(tiny_model_dir, tokenizer, replace(TRAIN, evals_per_epoch=3))
    assert all(torch.equal(adapter[name], value) for name, value in seen[1][0].items())
    assert trained.metrics["val/loss/tuned"] == 3.0
    assert trained.metrics["train/steps/best"] == 2
    assert trained.metrics["train/stopped_early"] == 0


def test_training_stops_once_validation_has_not_gained_for_long_enough(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([5.0, 3.0, 3.5, 3.4, 1.0], monkeypatch)
    p = replace(TRAIN, evals_per_epoch=6, early_stopping_patience=2)
    trained, _ = fit(tiny_model_dir, tokenizer, p)
    assert trained.metrics["train/steps"] == 3
    assert trained.metrics["train/stopped_early"] == 1
    assert trained.metrics["val/loss/tuned"] == 3.0


def test_a_validation_loss_that_is_never_a_number_fails(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([5.0, float("nan"), float("inf")], monkeypatch)
    with pytest.raises(GateError, match="no validation loss was finite"):
        fit(tiny_model_dir, tokenizer, TRAIN)


def test_a_loss_that_explodes_stops_the_run_with_its_step(tiny_model_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(GateError, match=r"(loss|gradient norm) is (nan|inf) at step \d.*train\.learning_rate"):
        fit(tiny_model_dir, tokenizer, replace(TRAIN, learning_rate=1.0e30))


def test_an_adapter_that_does_not_move_stops_the_run(tiny_model_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(GateError, match=r"lora_A.* was not moved by \d steps"):
        fit(tiny_model_dir, tokenizer, replace(TRAIN, learning_rate=1.0e-30))


def test_samples_show_prompt_answer_and_reference_at_each_evaluation(tiny_model_dir: Path, tokenizer: Any) -> None:
    trained, _ = fit(tiny_model_dir, tokenizer, replace(TRAIN, samples=2))
    assert [(line["step"], line["id"]) for line in trained.samples] == [(3, "0"), (3, "1"), (6, "0"), (6, "1")]
    assert trained.samples[1]["prompt"] == "user\nadd 1\nassistant\n"
    assert trained.samples[1]["reference"] == "fox fox "
