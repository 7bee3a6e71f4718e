"""Watching a training: evaluate on plan, keep the best adapter, stop early or on a broken run, show how it goes."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from stages.lib import (
    adapters,
    generation,
    launching,
    live,
    optimisation,
    packing,
    progress,
    stage,
    tracking,
    unpacking,
)
from stages.lib.errors import DataError, GateError
from stages.lib.schema.train import Train

if TYPE_CHECKING:
    from stages.lib.training import PackedTrainer

log = logging.getLogger(__name__)

WARM_UP_STEPS = 2
"""Optimizer steps of this process left out of the measured speed: allocation and first use of every kernel."""

AGAIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""How far, relatively, the best adapter's validation loss may lie from itself when computed again. With strict numerics
on a CPU it does not differ at all; on a GPU sums may be taken in another order."""


@dataclass
class Trained:
    """What a training leaves beside the model, which holds the best checkpoint when it ends."""

    curve: list[dict[str, float]] = field(default_factory=list)  # one line an optimizer step
    samples: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""  # why there were no more steps
    metrics: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompting:
    """How samples are asked for: which validation prompts, and when an answer ends."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: Sequence[int]
    rows: Sequence[packing.Document]
    max_tokens: int


@dataclass
class Course:
    """How the evaluations went so far, all in nats per labelled token.

    A lower validation loss is the best so far. It counts as a gain where it is lower by early_stopping_threshold than
    at the last gain: many small steps add up to one, noise does not.
    """

    base_loss: float = math.nan  # validation loss with the adapter off
    val_loss: float = math.nan  # of the last evaluation
    train_loss: float = math.nan  # mean over the steps between the last two
    best_loss: float = math.inf
    best_step: int = 0
    best_gap: float = math.nan  # validation loss less training loss, at the best evaluation
    gained_loss: float = math.inf  # at the last gain
    without_gain: int = 0  # evaluations since
    is_overfitting: bool = False  # ever: validation rose while training fell, from one evaluation to the next

    def evaluated(self, step: int, val_loss: float, train_loss: float, *, threshold: float) -> bool:
        """Take in an evaluation; returns whether it is the best so far. What is no number never is, nor a gain."""
        self.is_overfitting |= val_loss > self.val_loss and train_loss < self.train_loss
        self.val_loss, self.train_loss = val_loss, train_loss
        self.without_gain += 1
        if self.gained_loss - val_loss > threshold:
            self.gained_loss, self.without_gain = val_loss, 0
        if is_best := val_loss < self.best_loss:
            self.best_loss, self.best_step, self.best_gap = val_loss, step, val_loss - train_loss
        return is_best


def tokens_per_second(steps: Sequence[tuple[int, float]]) -> float:
    """Tokens of some steps over their seconds."""
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


class Watch(TrainerCallback):
    """Evaluates on plan, keeps the best adapter, stops early, notices a broken run, and shows how it goes."""

    def __init__(self, trainer: "PackedTrainer", p: Train, prompting: Prompting) -> None:
        self.trainer, self.p, self.prompting = trainer, p, prompting
        self.trained = Trained()
        self.course = Course()
        self.best: dict[str, torch.Tensor] = {}
        self.timed: list[tuple[int, float]] = []  # tokens and seconds of each step of this process

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """All that a resumed training needs from here to end as this one would: plain values, and the best adapter."""
        values = {"curve": self.trained.curve, "samples": self.trained.samples, "course": asdict(self.course)}
        return values, self.best

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave. Times and speeds are not part of it: they are of one process."""
        self.trained.curve, self.trained.samples = list(values["curve"]), list(values["samples"])
        self.course, self.best = Course(**values["course"]), dict(tensors)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(packing.trained_tokens(pack.labels) for pack in self.trainer.validation):
            raise DataError(
                "data/packed/validation: found no labelled token, expected some. Raise split.validation_fraction or "
                "split.max_rows.validation."
            )
        live.start()
        self.planned = optimisation.evaluations(self.p, state.max_steps)
        self.steps_per_point = tracking.steps_per_point(state.max_steps)
        self.noise = optimisation.scale_noise(self.trainer.model, self.p.neftune_alpha)
        if not self.trained.curve:
            self.course.base_loss = self.course.val_loss = self.trainer.validation_loss(with_adapter=False)
            tracking.log_step(0, {"val/loss": self.course.base_loss})
            self._say(f"step 0/{state.max_steps}: validation loss {self.course.base_loss:.4f} (the base)")
        self.started = self.shown = time.monotonic()
        done, total = state.global_step, state.max_steps
        is_silent = None if launching.is_first() else True  # None: where there is no terminal
        self.bar = tqdm(total=total, initial=done, desc="qlora_train", unit="step", disable=is_silent)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started, self.step_tokens = time.perf_counter(), self.trainer.tokens_seen
        self.step_labels = self.trainer.labels_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.count()
        if self.trainer.labels_seen == self.step_labels:
            raise DataError(
                f"qlora_train: found no labelled token in the packs of step {state.global_step}, expected at least "
                "one to learn from. Raise train.batch_size or train.gradient_accumulation_steps, or see pack.labels."
            )
        seconds = time.perf_counter() - self.step_started
        self.timed.append((self.trainer.tokens_seen - self.step_tokens, seconds))
        control.should_evaluate = state.global_step in self.planned
        live.obey(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        step, tokens = state.global_step, self.trainer.tokens_seen
        values = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
        self._check(step, values)
        self.trained.curve.append({"step": step, "tokens": tokens, **values, "val_loss": self.course.val_loss})
        speed = tokens_per_second(self.timed[-self.steps_per_point :])
        if step % self.steps_per_point == 0:
            now = {"tokens_seen": tokens, "tokens_per_second": speed} | values
            memory = {"system/peak_memory_mib": self._peak_mib()}
            tracking.log_step(step, {f"train/{name}": value for name, value in now.items()} | memory)
        self._show(step, values["loss"], speed)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **kwargs: Any) -> None:
        step, course, p = state.global_step, self.course, self.p
        was_overfitting = course.is_overfitting
        since = max((line for line in self.planned if line < step), default=0)
        train_loss = statistics.fmean(line["loss"] for line in self.trained.curve[since:])
        val_loss = self.trained.curve[-1]["val_loss"] = metrics["eval_loss"]
        if course.evaluated(step, val_loss, train_loss, threshold=p.early_stopping_threshold):
            self.best = adapters.whole(self.trainer.model)
        mark = "the best so far" if course.best_step == step else f"{course.without_gain} without a gain"
        self._say(f"step {step}/{state.max_steps}: validation loss {val_loss:.4f} ({mark})")
        if course.is_overfitting and not was_overfitting:
            log.warning(
                "qlora_train: validation loss rose to %.4f by step %d while training loss fell to %.4f: overfitting "
                "has begun. Fewer train.epochs, more data, or a smaller lora.r would help.",
                *(val_loss, step, train_loss),
            )
        if p.early_stopping_patience and course.without_gain >= p.early_stopping_patience:
            control.should_training_stop = True
        if (self.planned.index(step) + 1) % tracking.steps_per_point(len(self.planned)) == 0:
            tracking.log_step(step, {"val/loss": val_loss})
        evaluated = [line["val_loss"] for line in self.trained.curve if line["step"] in self.planned]
        live.tell(evaluated, len(self.planned))
        self._sample(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.noise.remove()

    def finish(self) -> None:
        """Check that training moved the whole adapter, put the best one back into the model, and sum up."""
        self.bar.close()
        trainer, state, course = self.trainer, self.trainer.state, self.course
        if not self.best:
            raise GateError("qlora_train: no validation loss was finite. Lower train.learning_rate.")
        learned = adapters.whole(trainer.model)
        for name, values in learned.items():
            if torch.equal(values, trainer.drawn[name].to(values.device)):
                raise GateError(
                    f"qlora_train: {name} was not moved by {state.global_step} steps, expected every tensor of the "
                    "adapter to learn. Raise train.learning_rate or train.epochs, or leave the layer out of "
                    "lora.target_modules."
                )
        adapters.fill(trainer.model, self.best)
        again = trainer.validation_loss()
        if not abs(again - course.best_loss) <= AGAIN[trainer.compute_dtype] * course.best_loss:
            raise GateError(
                f"qlora_train: the adapter of step {course.best_step}, put back, has a validation loss of {again:.6f}, "
                f"expected the {course.best_loss:.6f} measured then: its weights were not kept whole."
            )
        self.trained.ended = self._reason(state)
        self._say(f"ended: {self.trained.ended}; the adapter is that of step {course.best_step}")
        self.trained.metrics = {
            "val/loss/base": course.base_loss,
            "val/loss/tuned": course.best_loss,
            "val/gap": course.best_gap,
            "train/loss/first": self.trained.curve[0]["loss"],
            "train/loss/last": self.trained.curve[-1]["loss"],
            "train/steps": state.global_step,
            "train/steps/planned": state.max_steps,
            "train/steps/best": course.best_step,
            "train/stopped_early": int(state.global_step < state.max_steps),
            "train/overfitting": int(course.is_overfitting),
            "train/tokens": trainer.tokens_seen,
            "train/tokens/labelled": trainer.labels_seen,
            "adapter/trainable_parameters": sum(values.numel() for values in learned.values()),
        }
        self.trained.measured = {
            "train/seconds": time.monotonic() - self.started,
            "train/steps_in_full": int(len(self.timed) == state.max_steps),  # and none by an earlier process
            "train/peak_memory_mib": self._peak_mib(),
        }
        if self.timed:  # none where the process before had done every step
            counted = self.timed[WARM_UP_STEPS:] or self.timed[-1:]
            self.trained.measured["train/tokens_per_second"] = tokens_per_second(counted)

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        """Raise GateError when loss or gradient of a step say that nothing is, or can be, learned."""
        for name, value in (("loss", values["loss"]), ("gradient norm", values["grad_norm"])):
            if not math.isfinite(value):
                raise GateError(
                    f"qlora_train: {name} is {value} at step {step}, expected a finite number above 0. "
                    "Lower train.learning_rate; numerics.compute_dtype=float32 rules out overflow."
                )
            if value == 0:
                raise GateError(
                    f"qlora_train: {name} is 0 at step {step}, expected a finite number above 0: nothing is left to "
                    "learn, or the adapter takes no part in the loss. Fewer train.epochs, or see lora.target_modules."
                )

    def _reason(self, state: Any) -> str:
        done, planned = state.global_step, state.max_steps
        if done == planned:
            return f"all {planned} steps done"
        return (
            f"stopped at step {done} of {planned}, after {self.course.without_gain} evaluations in a row without a "
            f"validation loss lower by more than {self.p.early_stopping_threshold:g}"
        )

    def _show(self, step: int, loss: float, speed: float) -> None:
        """Move the bar on; where there is no terminal to draw it on, say each half minute what it would."""
        self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:.0f}", refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.shown >= progress.SECONDS:
            self.shown = now
            left = (now - self.started) / len(self.timed) * (self.trainer.state.max_steps - step)
            log.info(
                "qlora_train: step %d of %d, loss %.3f, %.0f tokens/s, %s left",
                *(step, self.trainer.state.max_steps, loss, speed, tqdm.format_interval(left)),
            )

    def _peak_mib(self) -> int:
        """Peak memory so far, MiB: of the GPU's tensors where there is one, else resident memory of the process."""
        return torch.cuda.max_memory_allocated() >> 20 if self.trainer.args.device.type == "cuda" else stage.peak_mib()

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
        tracking.log_table("samples", self.trained.samples)

    def _say(self, line: str) -> None:
        tqdm.write(line)
