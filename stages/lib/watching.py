"""Watching a training: evaluate on plan, keep the best adapter, stop early or on a broken run, show how it goes."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stages.lib import adapters, generation, packing, tracking, unpacking
from stages.lib.errors import GateError
from stages.lib.schema.train import Train

if TYPE_CHECKING:
    from stages.lib.training import PackedTrainer

WARM_UP_STEPS = 2
"""Optimizer steps left out of the measured speed: allocation and first use of every kernel."""


STATE = ("base_loss", "best_loss", "best_step", "without_gain", "val_loss")
"""Attributes of a Watch that a checkpoint keeps, beside curve, samples and best adapter."""


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


class Watch(TrainerCallback):
    """Evaluates on plan, keeps the best adapter, stops early, notices a broken run, and shows how it goes."""

    def __init__(self, trainer: "PackedTrainer", p: Train, prompting: Prompting) -> None:
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
        self.started = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="qlora_train", unit="step", disable=None)
        if state.global_step == 0:  # otherwise restored
            self.val_loss = self.base_loss = self.trainer.validation_loss(with_adapter=False)
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
            self.best = {n: w.detach().clone() for n, w in adapters.trainable(self.trainer.model).items()}
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
        parameters = adapters.trainable(model)
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
        with unpacking.unpacked(model, self.trainer.compute_dtype):
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

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a resumed training needs to go on as if it had not stopped: JSON values, and the best adapter so far."""
        values = {name: getattr(self, name) for name in STATE}
        return values | {"curve": self.trained.curve, "samples": self.trained.samples}, self.best

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave, before the training begins."""
        for name in STATE:
            setattr(self, name, values[name])
        self.trained.curve, self.trained.samples = list(values["curve"]), list(values["samples"])
        self.best = dict(tensors)
