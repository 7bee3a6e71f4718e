"""The training loop: TRL's SFTTrainer on packed sequences, watched: a broken run stops, the best checkpoint is kept."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import SFTTrainer

from stages.lib import adapters, launching, numerics, optimisation, packing
from stages.lib.checkpoints import Checkpoints
from stages.lib.errors import ExternalError, GateError
from stages.lib.loss import answer_nll, end_to_end
from stages.lib.schema.train import Sharding, Train
from stages.lib.watching import Prompting, Trained, Watch

START_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far, relatively, the first training loss may lie from the base's on the same tokens: the adapter adds nothing."""


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
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train the adapter, and leave the one with the lowest validation loss in the model.

    Args: checkpoints: where the training saves how far it is, and goes on from: to the same bytes as without a break.

    Raises: GateError, when the loss starts away from the base's, becomes NaN, infinite or zero, or an adapter tensor
    never moved.
    """
    documents = sorted((d for pack in validation for d in packing.documents(pack)), key=lambda d: d.row_id)
    prompting = Prompting(tokenizer, stop_ids, documents[: p.samples], p.sample_tokens)
    with TemporaryDirectory() as scratch:
        trainer = PackedTrainer(model, packs, validation, p, tokenizer, resolved, seed=seed, output_dir=scratch)
        watch = trainer.watch = Watch(trainer, p, prompting)
        trainer.add_callback(watch)
        point = None
        if checkpoints:
            trainer.checkpoints = checkpoints
            trainer.add_callback(Saving(checkpoints))
            (point,) = broadcast_object_list([checkpoints.newest() if launching.is_first() else None])
        trainer.train(resume_from_checkpoint=str(point) if point else None)
    watch.finish()
    return watch.trained


class Saving(TrainerCallback):
    """Asks for a checkpoint when one is due, and after each evaluation, which is long to repeat."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (control.should_save,) = broadcast_object_list([self.checkpoints.is_due()])  # as the first process's clock says

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True


class PackedTrainer(SFTTrainer):
    """SFTTrainer whose batch is one long sequence of packs, and whose loss computes logits where there are labels only.

    The packs of a batch are laid end to end: with documents isolated that is the same function, without padding.
    Of several processes each has batches of its own; a step's gradient is the sum over all its labelled tokens by their
    number, and every process knows the same losses and counts.
    """

    loss_is_scaled_for_ga = True  # by compute_loss; the trainer must not divide by the batches of a step again

    watch: Watch
    checkpoints: Checkpoints

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
        drawn = {name: parameter.detach().clone() for name, parameter in adapters.trainable(model).items()}
        super().__init__(
            model,
            args=optimisation.arguments(p, resolved, seed=seed, output_dir=output_dir),
            train_dataset=Dataset.from_list([vars(pack) for pack in packs]),
            processing_class=tokenizer,
            data_collator=end_to_end,
        )
        self.remove_callback(PrinterCallback)
        if (found := self.accelerator.num_processes) != p.processes:
            raise ExternalError(
                f"train.processes: found {found} that know each other, expected {p.processes}. "
                "Variables such as WORLD_SIZE, RANK or LOCAL_RANK in the environment may come from another launcher."
            )
        if p.sharding is Sharding.fsdp and not self.accelerator.is_fsdp2:  # accelerate would go on without a word
            raise ExternalError(
                f"train.sharding: found fsdp with {self.accelerator.distributed_type}, expected several GPUs: nothing "
                "would be shared."
            )
        self.model_accepts_loss_kwargs = True  # so that labels are counted over a step, whatever the model's signature
        self.validation = validation
        self.tokens_seen = self.labels_seen = 0  # of all processes, up to the last step
        self.seen_here = [0, 0]  # tokens and labels of this process since
        self.compute_dtype = getattr(torch, resolved.compute_dtype)
        self.start_tolerance = START_TOLERANCE[resolved.compute_dtype]
        # SFTTrainer casts the adapter of a 4-bit base to bfloat16; here it gets numerics.adapter_dtype.
        self.drawn = {name: values.to(getattr(torch, resolved.adapter_dtype)) for name, values in drawn.items()}
        for name, parameter in adapters.trainable(model).items():
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
        if not (self.tokens_seen or self.seen_here[0]):
            self._check_start(inputs)
        self.seen_here[0] += inputs["input_ids"].shape[1]
        self.seen_here[1] += n_labels
        loss = nll / (n_labels if num_items_in_batch is None else num_items_in_batch)
        return loss * self.args.world_size if self.args.world_size > 1 else loss  # gradients will be averaged

    def count(self) -> None:
        """Add up over the processes what they have seen since the last step."""
        tokens, labels = self._sums(self.seen_here)
        self.tokens_seen, self.labels_seen = self.tokens_seen + int(tokens), self.labels_seen + int(labels)
        self.seen_here = [0, 0]

    def _sums(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, taken in the order of their ranks."""
        here = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.gather(here).view(-1, len(values)).sum(0).tolist()

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
            for first in range(0, len(self.validation), size * self.args.world_size):
                i = first + size * self.args.process_index
                own = self.validation[i : i + size]
                # What processes have shares of takes all of them for every pass, the one without a batch, too.
                batch = end_to_end([vars(pack) for pack in own or self.validation[:1]])
                with self.compute_loss_context_manager():
                    nll, n_labels = answer_nll(model, self._prepare_inputs(batch))
                if own:
                    total, n = total + nll.double().item(), n + n_labels
        model.train()
        nats, labels = self._sums([total, n])
        return nats / labels

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a point to go on from; none at the end, which the callbacks' say to stop would not survive."""
        if self.control.should_training_stop:
            return
        random, adapter, optimizer = self._random_states(), adapters.whole(self.model), self._optimizer_state()
        if self.is_world_process_zero():
            self.checkpoints.save(
                self.state.global_step, lambda folder: self._write_state(folder, random, adapter, optimizer)
            )

    def _random_states(self) -> dict[str, bytes]:
        """The files in which Trainer keeps the states of the random generators, of every process."""
        with TemporaryDirectory() as scratch:
            self._save_rng_state(scratch)
            return dict(gather_object([(path.name, path.read_bytes()) for path in Path(scratch).iterdir()]))

    def _optimizer_state(self) -> dict[str, Any]:
        """What Trainer reads again; on the first process, put together where there are shares."""
        if not self.is_fsdp_enabled:
            return self.optimizer.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not (checkpoint and self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, weights_only=True) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, optimizer, options=options)
        self.lr_scheduler.load_state_dict(scheduler)

    def _write_state(
        self,
        folder: Path,
        random: dict[str, bytes],
        adapter: dict[str, torch.Tensor],
        optimizer: dict[str, Any],
    ) -> None:
        values, best = self.watch.state()
        counts = {"tokens_seen": self.tokens_seen, "labels_seen": self.labels_seen}
        (folder / "progress.json").write_text(json.dumps({"trainer": counts, "watch": values}))
        save_file(best, folder / "best.safetensors")
        save_file(adapter, folder / "adapter.safetensors")
        torch.save(optimizer, folder / OPTIMIZER_NAME)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        for name, content in random.items():
            (folder / name).write_bytes(content)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The adapter as it was, with its dtype, and what the watch knew; the rest of a point is read by Trainer."""
        folder = Path(resume_from_checkpoint)
        found = json.loads((folder / "progress.json").read_text())
        self.tokens_seen, self.labels_seen = (found["trainer"][name] for name in ("tokens_seen", "labels_seen"))
        parameters, device = adapters.trainable(self.model), self.args.device
        device = str(device) if device.type == "cuda" else device.type  # no index: safetensors knows no cpu:0
        self.watch.restore(found["watch"], load_file(folder / "best.safetensors", device=device))
        stored = load_file(folder / "adapter.safetensors", device=device)
        assert stored.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert (stored[name].dtype, stored[name].shape) == (parameter.dtype, parameter.shape)
        adapters.fill(self.model, stored)
        print(f"qlora_train: goes on after {folder.name}")

    @torch.no_grad()
    def _check_start(self, inputs: dict[str, torch.Tensor]) -> None:
        """The adapter adds nothing yet, so that training has to start at the loss of the base.

        Compared without dropout and NEFTune's noise, which are of training and not of the start. Virtual tokens change
        every answer from the start.
        """
        if adapters.is_virtual(self.model):
            return
        self.model.eval()
        tuned, n_labels = answer_nll(self.model, inputs)
        with self.model.disable_adapter():
            base, _ = answer_nll(self.model, inputs)
        self.model.train()
        if not abs(tuned - base) <= self.start_tolerance * base:
            raise GateError(
                f"qlora_train: the first loss is {tuned / n_labels:.4f}, expected {base / n_labels:.4f}, the base's on "
                f"the same tokens, within {self.start_tolerance:.1%}: base or adapter was not loaded as configured in "
                "numerics.*."
            )
