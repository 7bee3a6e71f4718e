"""conf/train as TRL's trainer carries it out: against a plain loop, schedule by schedule, and with noise."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import get_scheduler
from transformers.integrations import neftune

from stages.lib import adapters, chat, loss, models, numerics, optimisation, packing, training
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import LOW_RANK, Lora, Method
from stages.lib.schema.numerics import Quantization
from stages.lib.schema.train import Optimizer, Scheduler, Train, check_optimizer
from tests.tiny_training import LORA, NF4, TRAIN, conversations, fit, packs


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return chat.load_tokenizer(tiny_model_dir)


def document(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[tuple[int, ...], list[bool]]:
    """Token ids of a conversation, and which of them are an answer's: after its prompt, to its end of turn."""
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    is_answer = [False] * len(ids)
    for i in range(1, len(turns), 2):
        start = len(tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, return_dict=False))
        end = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), start)
        is_answer[start : end + 1] = [True] * (end + 1 - start)
    return tuple(ids), is_answer


def plain_loop(
    folder: Path, start: dict[str, torch.Tensor], steps: list[list[tuple[tuple[int, ...], list[bool]]]], p: Train
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the adapter at the end.

    One document at a time through the unpacked weights and PEFT's own layers, loss by hand, torch's AdamW.
    """
    lora = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(models.load_base(folder, NF4, dense=True), lora).train()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert parameters.keys() == start.keys()
    for name, value in parameters.items():
        value.data.copy_(start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=p.learning_rate, weight_decay=p.weight_decay)
    curve = []
    for k, documents in enumerate(steps):
        losses = []
        for ids, is_answer in documents:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            told = [i for i in range(1, len(ids)) if is_answer[i]]
            losses += [-functional.log_softmax(logits[i - 1], dim=0)[ids[i]] for i in told]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), p.max_grad_norm or float("inf"))
        optimizer.param_groups[0]["lr"] = p.learning_rate * (1 - k / len(steps))
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve, {name: value.detach() for name, value in parameters.items()}


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "max_grad_norm", "checkpointing"), [(1, 2, 0.5, False), (2, 1, 0.0, True)]
)
def test_steps_are_those_of_a_plain_loop_over_documents_alone(
    tiny_model_dir: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    checkpointing: bool,
) -> None:
    """Packs of one or two conversations, one with a question after an answer; two packs a step, in the last one."""
    turns = conversations(8)
    turns[2] += turns[4]
    documents = {ids: answers for ids, answers in (document(tokenizer, each) for each in turns)}
    rows = packing.Tokens.of([(str(i), chat.encode(tokenizer, each)) for i, each in enumerate(turns)])
    together = [pack for table in packing.packs(rows, max_tokens=64) for pack in packing.packs_of(table)]
    n_steps = (len(together) + 1) // 2
    assert len(together) % 2 == 1
    assert {len(pack.row_ids) for pack in together} == {1, 2}
    met: list[tuple[tuple[int, ...], list[bool]]] = []
    sizes: list[int] = []
    whole = training.PackedTrainer.compute_loss

    def compute_loss(trainer: Any, model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
        ids, lengths = inputs["input_ids"][0], packing.document_lengths(inputs["position_ids"][0].tolist())
        met.extend((tuple(part.tolist()), documents[tuple(part.tolist())]) for part in ids.split(lengths))
        sizes.append(len(lengths))
        return whole(trainer, model, inputs, **more)

    monkeypatch.setattr(training.PackedTrainer, "compute_loss", compute_loss)
    p = replace(
        TRAIN,
        learning_rate=1.0e-3,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        scheduler=Scheduler.linear,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=checkpointing,
        evals_per_epoch=1,
    )
    lora = replace(LORA, dropout=0.0)
    trained, adapter = fit(tiny_model_dir, tokenizer, p, lora=lora, rows=together)
    numerics.seed_everything(0, NF4)
    drawn = adapters.trainable(adapters.add_adapter(models.load_base(tiny_model_dir, NF4), lora))
    rest = iter(met)
    steps = [[next(rest) for _ in range(sum(sizes[i : i + accumulation]))] for i in range(0, len(sizes), accumulation)]
    assert len(met) == len(turns)
    assert len(steps) == len(trained.curve) == n_steps
    curve, expected = plain_loop(tiny_model_dir, {n: v.detach().clone() for n, v in drawn.items()}, steps, p)
    for line, (nats, norm) in zip(trained.curve, curve, strict=True):
        assert line["loss"] == pytest.approx(nats, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("evals_per_epoch", "eval_steps", "epochs", "n_steps", "expected"),
    [
        (2, None, 1.0, 30, [15, 30]),
        (2, None, 2.5, 10, [2, 4, 6, 8, 10]),
        (1, None, 0.1, 7, [7]),
        (4, None, 1.0, 2, [1, 2]),
        (2, 4, 1.0, 10, [4, 8, 10]),
        (2, 4, 1.0, 8, [4, 8]),
        (2, 40, 1.0, 10, [10]),
    ],
)
def test_evaluations_come_by_epochs_or_by_steps_and_after_the_last_step(
    evals_per_epoch: int, eval_steps: int | None, epochs: float, n_steps: int, expected: list[int]
) -> None:
    p = replace(TRAIN, evals_per_epoch=evals_per_epoch, eval_steps=eval_steps, epochs=epochs)
    assert optimisation.evaluations(p, n_steps) == expected


@pytest.mark.parametrize(
    ("scheduler", "warmup_ratio", "expected"),
    [
        (Scheduler.cosine, 0.2, [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
        (Scheduler.linear, 0.2, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (Scheduler.constant, 0.0, [1] * 10),
        (Scheduler.constant_with_warmup, 0.2, [0, 0.5, *[1] * 8]),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    scheduler: Scheduler, warmup_ratio: float, expected: Sequence[float], tmp_path: Path
) -> None:
    p = replace(TRAIN, learning_rate=1.0, scheduler=scheduler, warmup_ratio=warmup_ratio)
    args = optimisation.arguments(p, numerics.resolve(NF4), seed=0, output_dir=str(tmp_path))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10)
    found = []
    for _ in range(10):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_constant_schedule_with_a_warm_up_is_refused_and_the_one_that_has_it_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup_ratio: found 0\.1.*constant_with_warmup"):
        replace(TRAIN, scheduler=Scheduler.constant, warmup_ratio=0.1)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_an_optimizer_that_needs_a_gpu_is_refused_without_one(optimizer: Optimizer, tmp_path: Path) -> None:
    p, cpu = replace(TRAIN, optimizer=optimizer), numerics.resolve(NF4)
    assert optimisation.arguments(p, cpu, seed=0, output_dir=str(tmp_path)).optim == optimizer.value
    check_optimizer(p, "cuda")
    if "8bit" in optimizer or "paged" in optimizer:
        with pytest.raises(ConfigError, match=r"train\.optimizer: found .* with numerics\.device=cpu"):
            check_optimizer(p, cpu.device)
    else:
        check_optimizer(p, cpu.device)


class Embedder(torch.nn.Module):
    """A model that is nothing but its embeddings, all of them 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding.from_pretrained(torch.zeros(8, 64))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings

    def forward(self, position_ids: torch.Tensor) -> Any:
        return self.embeddings(torch.zeros_like(position_ids))


@pytest.mark.parametrize("documents", [1, 4])
def test_the_noise_is_as_strong_however_many_documents_lie_end_to_end(documents: int) -> None:
    model = Embedder()
    neftune.activate_neftune(model, 5.0)
    optimisation.scale_noise(model, 5.0)
    noise = model(position_ids=torch.arange(25).repeat(documents)[None])
    assert noise.abs().max().item() == pytest.approx(5.0 / (25 * 64) ** 0.5, rel=0.01)
    assert not model.eval()(position_ids=torch.arange(25)[None]).any()


def test_noise_is_in_training_and_not_in_the_start_nor_in_evaluations(
    tiny_model_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphas: list[float] = []
    whole = neftune.neftune_post_forward_hook

    def hook(module: Any, *args: Any) -> torch.Tensor:
        if module.training:
            alphas.append(module.neftune_noise_alpha)
        return whole(module, *args)

    monkeypatch.setattr(neftune, "neftune_post_forward_hook", hook)
    trained, _ = fit(tiny_model_dir, tokenizer, replace(TRAIN, neftune_alpha=1000.0, batch_size=6, epochs=2.0))
    assert alphas == [pytest.approx(1000.0 * 6**0.5)] * 2  # six documents in each of two steps, and nowhere else
    base = models.load_base(tiny_model_dir, NF4)
    nll, n = loss.answer_nll(base, loss.end_to_end([vars(pack) for pack in packs(tokenizer, 3)]))
    assert trained.metrics["val/loss/base"] == pytest.approx(nll.item() / n, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", Method)
def test_every_method_goes_through_the_whole_loop(tiny_model_dir: Path, tokenizer: Any, method: Method) -> None:
    """Start, gradients, the best adapter put back and measured again; with noise and, where it can, checkpointing."""
    lora = Lora(4, 8.0, 0.1 if method in LOW_RANK else 0.0, "all-linear", method=method)
    p = replace(
        TRAIN,
        epochs=2.0,
        learning_rate=1.0e-4 if method is Method.full else 1.0e-2,
        optimizer=Optimizer.adamw_torch_fused,
        neftune_alpha=5.0,
        gradient_checkpointing=method is not Method.prefix_tuning,
    )
    held = replace(NF4, quantization=Quantization.none) if method is Method.full else NF4
    model = adapters.add_adapter(models.load_base(tiny_model_dir, held), lora)
    trained, _ = fit(tiny_model_dir, tokenizer, p, prepared=model)
    assert trained.metrics["val/loss/tuned"] < trained.metrics["val/loss/base"]
