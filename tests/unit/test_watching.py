"""What is seen and decided while a training runs: the best adapter, early stopping, broken runs, curves, samples."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commands import sync
from stages.lib import adapters, chat, optimisation, progress, tracking, training, watching
from stages.lib.errors import DataError, GateError
from stages.lib.watching import Course, Trained, Watch
from tests.tiny_training import TRAIN, fit, packs


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


def test_training_stops_once_validation_has_not_gained_enough_for_long_enough(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([5.0, 3.0, 2.95, 2.9, 1.0], monkeypatch)
    p = replace(TRAIN, eval_steps=1, early_stopping_patience=2, early_stopping_threshold=0.2)
    trained, _ = fit(tiny_model_dir, tokenizer, p)
    assert trained.metrics["train/steps"] == 3
    assert trained.metrics["train/stopped_early"] == 1
    assert trained.metrics["val/loss/tuned"] == 2.9
    assert trained.ended == (
        "stopped at step 3 of 6, after 2 evaluations in a row without a validation loss lower by more than 0.2"
    )


def course(*evaluations: tuple[float, float], threshold: float = 0.0) -> Course:
    """A course of evaluations with these validation and training losses, at steps 1, 2, ..."""
    found = Course(base_loss=5.0, val_loss=5.0)
    for step, (val_loss, train_loss) in enumerate(evaluations, start=1):
        found.evaluated(step, val_loss, train_loss, threshold=threshold)
    return found


def test_small_gains_add_up_to_one_that_counts() -> None:
    found = course((3.0, 3.0), (2.95, 3.0), (2.9, 3.0), (2.75, 3.0), (2.7, 3.0), threshold=0.2)
    assert (found.gained_loss, found.without_gain) == (2.75, 1)
    assert (found.best_loss, found.best_step) == (2.7, 5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_neither_a_gain_nor_the_best(broken: float) -> None:
    assert course((broken, 3.0)).best_step == 0
    found = course((broken, 3.0), (3.0, 3.0), (broken, 3.0))
    assert (found.best_loss, found.best_step, found.without_gain) == (3.0, 2, 1)


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        (((3.0, 3.0), (3.2, 2.5)), True),
        (((3.0, 3.0), (3.2, 2.5), (3.1, 2.4)), True),
        (((3.0, 3.0), (3.2, 3.1)), False),  # both rise: a step too large
        (((3.0, 3.0), (2.9, 2.0)), False),  # a gap that widens while both fall
        (((6.0, 3.0),), False),
    ],
)
def test_overfitting_is_validation_that_rises_while_training_falls(
    evaluations: tuple[tuple[float, float], ...], expected: bool
) -> None:
    assert course(*evaluations).is_overfitting is expected


def test_overfitting_is_said_once_and_the_gap_is_that_of_the_best(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted([5.0, 3.0, 3.5, 3.6], monkeypatch)
    trained, _ = fit(tiny_model_dir, tokenizer, replace(TRAIN, epochs=3.0, batch_size=2, evals_per_epoch=1))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "validation loss rose to 3.5000 by step 6 while training loss fell" in line
    losses = [row["loss"] for row in trained.curve[:3]]
    assert trained.metrics["val/gap"] == pytest.approx(3.0 - sum(losses) / 3)
    assert trained.metrics["train/overfitting"] == 1


def test_a_best_adapter_that_does_not_measure_the_same_again_is_refused(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 3.0, 3.5, 3.1])
    monkeypatch.setattr(training.PackedTrainer, "validation_loss", lambda *_, **__: next(losses))
    with pytest.raises(GateError, match=r"the adapter of step 3, put back, has a validation loss of 3\.1"):
        fit(tiny_model_dir, tokenizer, TRAIN)


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


@pytest.mark.parametrize(("loss", "grad_norm"), [(0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_or_gradient_that_teaches_nothing_stops_the_run(loss: float, grad_norm: float) -> None:
    watch: Any = Watch(SimpleNamespace(tokens_seen=8), TRAIN, SimpleNamespace())
    name, value = ("gradient norm", grad_norm) if loss == 1 else ("loss", loss)
    logs = {"loss": loss, "grad_norm": grad_norm, "learning_rate": 1.0}
    with pytest.raises(GateError, match=f"{name} is {value:g} at step 7, expected a finite number above 0"):
        watch.on_log(None, SimpleNamespace(global_step=7), None, logs=logs)


def test_a_step_without_a_labelled_token_stops_the_run(tiny_model_dir: Path, tokenizer: Any) -> None:
    unlabelled = [replace(pack, labels=[chat.IGNORED] * len(pack.labels)) for pack in packs(tokenizer)]
    with pytest.raises(DataError, match="found no labelled token in the packs of step 1"):
        fit(tiny_model_dir, tokenizer, TRAIN, rows=unlabelled)


def test_a_validation_split_without_a_labelled_token_names_keys_of_the_split() -> None:
    watch: Any = Watch(SimpleNamespace(validation=[]), TRAIN, SimpleNamespace())
    with pytest.raises(DataError, match=r"split\.validation_fraction or split\.max_rows\.validation"):
        watch.on_train_begin(None, None, None)


def test_what_was_watched_goes_on_from_its_state(tiny_model_dir: Path) -> None:
    one: Any = Watch(SimpleNamespace(), TRAIN, SimpleNamespace())
    one.trained.curve, one.trained.samples = [{"step": 1, "val_loss": 2.5}], [{"step": 1, "answer": "fox"}]
    one.course, one.best = course((3.0, 2.0), (3.5, 1.0)), {"lora_A": torch.ones(2)}
    values, tensors = one.state()
    other: Any = Watch(SimpleNamespace(), TRAIN, SimpleNamespace())
    other.restore(json.loads(json.dumps(values)), tensors)
    assert other.trained == one.trained
    assert other.course == one.course
    assert other.best.keys() == one.best.keys()


@dataclass
class Seen:
    trained: Trained
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    tables: list[list[Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tiny_model_dir: Path, tokenizer: Any) -> Seen:
    """A training of six steps without a terminal, and what it showed."""
    found = Seen(Trained())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "log_step", lambda step, values: found.points.append((step, dict(values))))
        patch.setattr(tracking, "log_table", lambda name, rows: found.tables.append(list(rows)))
        patch.setattr(watching.log, "info", lambda line, *values: found.lines.append(line % values))
        patch.setattr(progress, "SECONDS", 0)
        patch.setattr(tracking, "MAX_POINTS", 3)
        found.trained, _ = fit(tiny_model_dir, tokenizer, replace(TRAIN, samples=2))
    return found


def test_live_curves_are_thinned_evenly_and_evaluations_are_points_of_their_own(seen: Seen) -> None:
    curves = ("loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second")
    every_second = {f"train/{name}" for name in curves} | {"system/peak_memory_mib"}
    assert [(step, set(values)) for step, values in seen.points] == [
        (0, {"val/loss"}),
        (2, every_second),
        (3, {"val/loss"}),
        (4, every_second),
        (6, every_second),
        (6, {"val/loss"}),
    ]


@pytest.mark.parametrize("planned", [900, 1001, 2500, 100_000])
def test_a_synced_curve_has_at_most_a_thousand_points_among_them_those_of_the_training(planned: int) -> None:
    """Of a training that was stopped at three quarters of its steps, with an evaluation after each second one."""
    steps = range(1, planned * 3 // 4 + 1)
    evaluations = optimisation.evaluations(replace(TRAIN, eval_steps=2), planned)
    synced = sync.curve(
        "step,loss,val_loss\n" + "".join(f"{step},{1 / step},{9 / (step // 2 + 1)}\n" for step in steps)
    )
    for name, shown in (("train/loss", list(range(1, planned + 1))), ("val/loss", evaluations)):
        points = {point.step for point in synced if point.key == name} - {0}
        every = tracking.steps_per_point(len(shown))
        assert 300 < len(points) <= 1000
        assert {step for step in shown[every - 1 :: every] if step in steps} <= points


def test_a_line_says_how_far_the_training_is_where_there_is_no_terminal(seen: Seen) -> None:
    assert len(seen.lines) == 6
    assert re.fullmatch(r"qlora_train: step 2 of 6, loss \d\.\d{3}, \d+ tokens/s, 00:\d\d left", seen.lines[1])


def test_the_curve_counts_tokens_and_holds_nothing_of_this_machine(seen: Seen) -> None:
    assert {name for row in seen.trained.curve for name in row} == {
        *("step", "tokens", "loss", "learning_rate", "grad_norm", "val_loss")
    }
    assert seen.trained.curve[-1]["tokens"] == seen.trained.metrics["train/tokens"]
    assert not any("second" in name or "memory" in name for name in seen.trained.metrics)
    assert set(seen.trained.measured) == {
        "train/seconds",
        "train/steps_in_full",
        "train/tokens_per_second",
        "train/peak_memory_mib",
    }


def test_samples_of_all_evaluations_are_one_table(seen: Seen) -> None:
    samples = seen.trained.samples
    assert [(line["step"], line["id"]) for line in samples] == [(3, "0"), (3, "1"), (6, "0"), (6, "1")]
    assert samples[1]["prompt"] == "user\nadd 1\nassistant\n"
    assert samples[1]["reference"] == "fox fox "
    assert seen.tables[-1] == samples
