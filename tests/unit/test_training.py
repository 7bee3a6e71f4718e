"""The training loop on a tiny model: the same bytes again, one loss however batches are cut, a start at the base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.lib import adapters, chat, checkpoints, loss, models, packing, scoring, training
from stages.lib.errors import GateError
from stages.lib.schema.numerics import ComputeDtype
from tests.tiny_training import LORA, NF4, TRAIN, conversations, fit, packs


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return chat.load_tokenizer(tiny_model_dir)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_bytes_on_one_thread_and_on_two(tiny_model_dir: Path, tokenizer: Any) -> None:
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        found.append(fit(tiny_model_dir, tokenizer, TRAIN))
    torch.set_num_threads(threads)
    assert_equal(found[0][1], found[1][1])
    assert_equal(found[1][1], found[2][1])
    assert found[0][0].curve == found[1][0].curve == found[2][0].curve


class Killed(BaseException):
    """The process is gone: nothing catches it, nothing is cleaned up."""


def test_a_training_killed_again_and_again_ends_with_the_same_bytes(
    tiny_model_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of three steps, the last of each from half a window; dropout and noise on; a point at every step.

    Killed within a half full window, while a point is written, and within the second epoch.
    """
    p = replace(TRAIN, epochs=2.0, gradient_accumulation_steps=2, evals_per_epoch=1, samples=1, neftune_alpha=5.0)
    rows = packs(tokenizer, 5)
    whole, adapter = fit(tiny_model_dir, tokenizer, p, rows=rows)
    monkeypatch.setattr(checkpoints, "_minutes", 0)
    answer_nll, save_rng = training.answer_nll, training.PackedTrainer._save_rng_state
    for forward, write in ((4, 0), (0, 2), (5, 0)):  # the how manieth forward pass or writing is the last
        left = {"forward": forward, "write": write}

        def until(name: str, left: dict[str, int] = left) -> None:
            left[name] -= 1
            if left[name] == 0:
                raise Killed(name)

        def forward_pass(model: Any, inputs: Any, until: Any = until) -> Any:
            if model.training:
                until("forward")
            return answer_nll(model, inputs)

        def writing(trainer: Any, folder: str, until: Any = until) -> None:
            until("write")
            save_rng(trainer, folder)

        monkeypatch.setattr(training, "answer_nll", forward_pass)
        monkeypatch.setattr(training.PackedTrainer, "_save_rng_state", writing)
        with pytest.raises(Killed, match=r"forward|write"):
            fit(tiny_model_dir, tokenizer, p, rows=rows, points=checkpoints.Checkpoints(tmp_path))
    assert [point.name for point in sorted(tmp_path.glob("step-*"))] == ["step-00000003", "step-00000004"]
    resumed, again = fit(tiny_model_dir, tokenizer, p, rows=rows, points=checkpoints.Checkpoints(tmp_path))
    assert_equal(adapter, again)
    assert (whole.curve, whole.samples, whole.metrics) == (resumed.curve, resumed.samples, resumed.metrics)


def test_another_seed_gives_another_adapter(tiny_model_dir: Path, tokenizer: Any) -> None:
    one, other = (fit(tiny_model_dir, tokenizer, TRAIN, seed=seed)[1] for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_batch_of_four_is_four_batches_of_one(tiny_model_dir: Path, tokenizer: Any) -> None:
    """Six packs of unequal answers make a step of four and one of two, however these are computed."""
    whole = replace(TRAIN, batch_size=4, evals_per_epoch=1)
    cut = replace(whole, batch_size=1, gradient_accumulation_steps=4)
    lora = replace(LORA, dropout=0.0)
    (one, _), (other, _) = (fit(tiny_model_dir, tokenizer, p, lora=lora) for p in (whole, cut))
    assert len(one.curve) == len(other.curve) == 2
    for a, b in zip(one.curve, other.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_loss_is_the_mean_over_labelled_tokens_of_documents_alone(tiny_model_dir: Path, tokenizer: Any) -> None:
    """Against transformers' own loss, one conversation at a time."""
    model = models.load_base(tiny_model_dir, NF4)
    total, n = 0.0, 0
    for pack in packs(tokenizer, 3):
        labels = torch.tensor([pack.labels])
        n_labels = int((labels != chat.IGNORED).sum())
        total += model(input_ids=torch.tensor([pack.input_ids]), labels=labels).loss.item() * n_labels
        n += n_labels
    trained, _ = fit(tiny_model_dir, tokenizer, replace(TRAIN, batch_size=2))
    assert trained.metrics["val/loss/base"] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_answers_in_a_pack_are_as_likely_as_evaluation_finds_them_alone(
    tiny_model_dir: Path, tokenizer: Any, is_training: bool
) -> None:
    rows = {str(i): chat.encode(tokenizer, turns) for i, turns in enumerate(conversations(4))}
    table = pa.concat_tables(packing.packs(packing.Tokens.of(list(rows.items())), max_tokens=256))
    (pack,) = packing.packs_of(table)
    torch.manual_seed(0)
    model = adapters.add_adapter(models.load_base(tiny_model_dir, NF4), replace(LORA, dropout=0.0))
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    batch = loss.end_to_end([vars(pack)])
    packed, n_labels = loss.answer_nll(model.train(is_training), batch)
    documents = packing.documents(pack)
    alone = scoring.answer_likelihoods(
        model.eval(), [d.prompt for d in documents], [d.answer for d in documents], batch_size=4
    )
    assert n_labels == sum(likelihood.n_tokens for likelihood in alone)
    assert packed.item() == pytest.approx(sum(likelihood.nll for likelihood in alone), rel=1e-5)
    batch["position_ids"] = torch.arange(len(pack.input_ids))[None]  # one document: each answer sees those before it
    together, _ = loss.answer_nll(model, batch)
    assert together.item() != pytest.approx(packed.item(), rel=1e-4)  # so that the comparison could have failed


@pytest.mark.parametrize("dtype", [ComputeDtype.float32, ComputeDtype.bfloat16])
def test_the_adapter_has_the_configured_dtype_whatever_the_trainer_prefers(
    tiny_model_dir: Path, tokenizer: Any, dtype: ComputeDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NF4, "adapter_dtype", dtype)
    _, adapter = fit(tiny_model_dir, tokenizer, TRAIN)
    assert {value.dtype for value in adapter.values()} == {getattr(torch, dtype.value)}


def test_an_adapter_that_does_not_start_at_the_base_stops_the_run(tiny_model_dir: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = adapters.add_adapter(models.load_base(tiny_model_dir, NF4), replace(LORA, dropout=0.0))
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_()
    with pytest.raises(GateError, match=r"the first loss is .* the base's on the same tokens"):
        fit(tiny_model_dir, tokenizer, TRAIN, prepared=model)
