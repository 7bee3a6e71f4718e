"""The training loop: TRL's SFTTrainer on packed sequences, watched: a broken run stops, the best checkpoint is kept."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from stages.lib import generation, models, numerics, packing, qlora, tracking
from stages.lib.chat import IGNORED
from stages.lib.errors import GateError
from stages.lib.schema.train import Train

START_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far, relatively, the first training loss may lie from the base's on the same tokens: the adapter adds nothing."""
WARM_UP_STEPS = 2
"""Optimizer steps left out of the measured speed: allocation and first use of every kernel."""


@dataclass
class Trained:
    """What a training leaves beside the model, which holds the best checkpoint when it ends."""

    curve: list[dict[str, float]] = field(default_factory=list)  # one line an optimizer step
    samples: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompting:
    """How samples are asked for: which validation prompts, and when an answer ends."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: Sequence[int]
    rows: Sequence[packing.Document]
    max_tokens: int


def train(
    model: PeftModel,
    packs: Sequence[packing.Pack],
    validation: Sequence[packing.Pack],
    p: Train,
    *,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: Sequence[int],
    resolved: numerics.Resolved,
    seed: int,
) -> Trained:
    """Train the adapter, and leave the one with the lowest validation loss in the model.

    Raises: GateError, when the loss starts away from the base's, becomes NaN, infinite or zero, or an adapter tensor
    never moved.
    """
    documents = sorted((d for pack in validation for d in packing.documents(pack)), key=lambda d: d.row_id)
    prompting = Prompting(tokenizer, stop_ids, documents[: p.samples], p.sample_tokens)
    with TemporaryDirectory() as scratch:
        trainer = PackedTrainer(model, packs, validation, p, tokenizer, resolved, seed=seed, output_dir=scratch)
        watch = Watch(trainer, p, prompting)
        trainer.add_callback(watch)
        trainer.train()
    watch.finish()
    return watch.trained


class PackedTrainer(SFTTrainer):
    """SFTTrainer whose batch is one long sequence of packs, and whose loss computes logits where there are labels only.

    The packs of a batch are laid end to end: with documents isolated that is the same function, without padding.
    """

    def __init__(
        self,
        model: PeftModel,
        packs: Sequence[packing.Pack],
        validation: Sequence[packing.Pack],
        p: Train,
        tokenizer: PreTrainedTokenizerFast,
        resolved: numerics.Resolved,
        *,
        seed: int,
        output_dir: str,
    ) -> None:
        drawn = {name: parameter.detach().clone() for name, parameter in qlora.trainable(model).items()}
        super().__init__(
            model,
            args=SFTConfig(
                output_dir=output_dir,
                seed=seed,
                data_seed=seed,
                learning_rate=p.learning_rate,
                num_train_epochs=p.epochs,
                per_device_train_batch_size=p.batch_size,
                per_device_eval_batch_size=p.batch_size,
                gradient_accumulation_steps=p.gradient_accumulation_steps,
                lr_scheduler_type=p.scheduler.value,
                warmup_steps=p.warmup_ratio,
                weight_decay=p.weight_decay,
                max_grad_norm=p.max_grad_norm,
                gradient_checkpointing=p.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                optim="adamw_torch",
                bf16=resolved.device == "cuda" and resolved.compute_dtype == "bfloat16",
                use_cpu=resolved.device == "cpu",
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([vars(pack) for pack in packs]),
            processing_class=tokenizer,
            data_collator=end_to_end,
        )
        self.remove_callback(PrinterCallback)
        self.validation = validation
        self.tokens_seen = self.labels_seen = 0
        self.compute_dtype = getattr(torch, resolved.compute_dtype)
        self.start_tolerance = START_TOLERANCE[resolved.compute_dtype]
        # SFTTrainer casts the adapter of a 4-bit base to bfloat16; here it gets numerics.adapter_dtype.
        self.drawn = {name: values.to(getattr(torch, resolved.adapter_dtype)) for name, values in drawn.items()}
        for name, parameter in qlora.trainable(model).items():
            parameter.data = self.drawn[name].clone()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross entropy per labelled token of the whole optimizer step, however it is cut into batches, in nats."""
        assert not return_outputs
        nll, n_labels = answer_nll(model, inputs)
        if self.tokens_seen == 0:
            self._check_start(nll.item() / n_labels, inputs)
        self.tokens_seen += inputs["input_ids"].shape[1]
        self.labels_seen += n_labels
        return nll / (n_labels if num_items_in_batch is None else num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss over all labelled tokens alike; TRL's own is a mean of batch means."""
        metrics = {"eval_loss": self.validation_loss()}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def validation_loss(self, *, with_adapter: bool = True) -> float:
        """Nats per labelled token of the validation split."""
        model, size = self.model, self.args.per_device_eval_batch_size
        model.eval()
        total, n = 0.0, 0
        with nullcontext() if with_adapter else model.disable_adapter():
            for i in range(0, len(self.validation), size):
                batch = end_to_end([vars(pack) for pack in self.validation[i : i + size]])
                with self.compute_loss_context_manager():
                    nll, n_labels = answer_nll(model, self._prepare_inputs(batch))
                total, n = total + nll.double().item(), n + n_labels
        model.train()
        return total / n

    @torch.no_grad()
    def _check_start(self, loss: float, inputs: dict[str, torch.Tensor]) -> None:
        """The adapter adds nothing yet, so that training has to start at the loss of the base."""
        with self.model.disable_adapter():
            nll, n_labels = answer_nll(self.model, inputs)
        base = nll.item() / n_labels
        if not abs(loss - base) <= self.start_tolerance * base:
            raise GateError(
                f"qlora_train: the first loss is {loss:.4f}, expected {base:.4f}, the base's on the same tokens, "
                f"within {self.start_tolerance:.1%}: base or adapter was not loaded as configured in numerics.*."
            )


def end_to_end(packs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Lay packs one after the other: input_ids, labels and position_ids, each (1, sum of T_i)."""
    columns = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[value for pack in packs for value in pack[name]]]) for name in columns}


def answer_nll(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood of the labelled tokens, summed, in nats, and their number.

    Only the hidden states that predict a labelled token go through the head: with a vocabulary of 49,152 and answers
    of a fifth of the tokens it would be a quarter of all work.
    """
    labels = inputs["labels"][0]  # (T,)
    predicting = (labels[1:] != IGNORED).nonzero()[:, 0]  # (A,)
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)]
    output = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        logits_to_keep=predicting,
        document_lengths=lengths,
        use_cache=False,
    )
    logits = output.logits[0].float()  # (A, V)
    return functional.cross_entropy(logits, labels[predicting + 1], reduction="sum"), len(predicting)


class Watch(TrainerCallback):
    """Evaluates on plan, keeps the best adapter, stops early, notices a broken run, and shows how it goes."""

    def __init__(self, trainer: PackedTrainer, p: Train, prompting: Prompting) -> None:
        self.trainer, self.p, self.prompting = trainer, p, prompting
        self.trained = Trained()
        self.best_loss, self.best_step = math.inf, 0
        self.best: dict[str, torch.Tensor] = {}
        self.without_gain = 0
        self.val_loss = math.nan
        self.seconds, self.tokens = 0.0, 0  # of the steps that count for speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        n = min(self.p.evals_per_epoch * math.ceil(self.p.epochs), state.max_steps)
        self.planned = {round(state.max_steps * (i + 1) / n) for i in range(n)}
        self.val_loss = self.base_loss = self.trainer.validation_loss(with_adapter=False)
        self.started = time.monotonic()
        self.bar = tqdm(total=state.max_steps, desc="qlora_train", unit="step", disable=None)
        self._say(f"step 0/{state.max_steps}: validation loss {self.base_loss:.4f} (the base)")
        tracking.log_step(0, {"val/loss": self.base_loss})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started, self.step_tokens = time.perf_counter(), self.trainer.tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds, tokens = time.perf_counter() - self.step_started, self.trainer.tokens_seen - self.step_tokens
        if state.global_step > min(WARM_UP_STEPS, state.max_steps - 1):
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        self.speed = tokens / seconds
        control.should_evaluate = state.global_step in self.planned

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss, grad_norm = logs["loss"], logs["grad_norm"]
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value) or value == 0:
                raise GateError(
                    f"qlora_train: {name} is {value} at step {state.global_step}, expected a finite number above 0. "
                    "Lower train.learning_rate; numerics.compute_dtype=float32 rules out overflow."
                )
        values = {"loss": loss, "learning_rate": logs["learning_rate"], "grad_norm": grad_norm}
        self.trained.curve.append({"step": state.global_step, **values, "val_loss": self.val_loss})
        live = {f"train/{name}": value for name, value in values.items()}
        tracking.log_step(state.global_step, live | {"train/tokens_per_second": self.speed})
        self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{self.speed:.0f}", refresh=False)
        self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **kwargs: Any) -> None:
        self.val_loss = self.trained.curve[-1]["val_loss"] = metrics["eval_loss"]
        is_better = math.isfinite(self.val_loss) and self.val_loss < self.best_loss
        if is_better:
            self.best_loss, self.best_step, self.without_gain = self.val_loss, state.global_step, 0
            self.best = {n: w.detach().clone() for n, w in qlora.trainable(self.trainer.model).items()}
        else:
            self.without_gain += 1
            control.should_training_stop |= self.without_gain == self.p.early_stopping_patience
        mark = "the best so far" if is_better else f"{self.without_gain} without a better one"
        self._say(f"step {state.global_step}/{state.max_steps}: validation loss {self.val_loss:.4f} ({mark})")
        tracking.log_step(state.global_step, {"val/loss": self.val_loss})
        self._sample(state.global_step)

    def finish(self) -> None:
        """Check that training moved the whole adapter, put the best one back into the model, and sum up."""
        self.bar.close()
        model, state = self.trainer.model, self.trainer.state
        if not self.best:
            raise GateError("qlora_train: no validation loss was finite. Lower train.learning_rate.")
        parameters = qlora.trainable(model)
        for name, parameter in parameters.items():
            if torch.equal(parameter, self.trainer.drawn[name].to(parameter.device)):
                raise GateError(
                    f"qlora_train: {name} was not moved by {state.global_step} steps, expected every tensor of the "
                    "adapter to learn. Raise train.learning_rate or train.epochs, or leave the layer out of "
                    "lora.target_modules."
                )
            parameter.data.copy_(self.best[name])
        self.trained.metrics = {
            "val/loss/base": self.base_loss,
            "val/loss/tuned": self.best_loss,
            "train/loss/first": self.trained.curve[0]["loss"],
            "train/loss/last": self.trained.curve[-1]["loss"],
            "train/steps": state.global_step,
            "train/steps/best": self.best_step,
            "train/stopped_early": int(state.global_step < state.max_steps),
            "train/tokens": self.trainer.tokens_seen,
            "train/tokens/labelled": self.trainer.labels_seen,
            "adapter/trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        }
        self.trained.measured = {
            "train/tokens_per_second": self.tokens / self.seconds,
            "train/seconds": time.monotonic() - self.started,
        }

    def _sample(self, step: int) -> None:
        """Answer the first validation prompts as the model does now, for the eye."""
        if not (rows := self.prompting.rows):
            return
        tokenizer, model = self.prompting.tokenizer, self.trainer.model
        model.eval()
        with models.unpacked(model, self.trainer.compute_dtype):
            answers = generation.greedy(
                model,
                [row.prompt for row in rows],
                stop_ids=self.prompting.stop_ids,
                max_new_tokens=self.prompting.max_tokens,
                batch_size=len(rows),
            )
        model.train()
        for row, answer in zip(rows, answers, strict=True):
            texts = {"prompt": row.prompt, "answer": answer.ids, "reference": row.answer}
            line = {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
            self.trained.samples.append({"step": step, "id": row.row_id, "stopped": answer.stopped, **line})
        tracking.log_table("samples", self.trained.samples[-len(rows) :])

    def _say(self, line: str) -> None:
        tqdm.write(line)
