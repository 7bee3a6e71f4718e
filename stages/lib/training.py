"""The training loop: TRL's SFTTrainer on packed sequences, watched: a broken run stops, the best checkpoint is kept."""

from collections.abc import Sequence
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTTrainer

from stages.lib import adapters, numerics, optimisation, packing
from stages.lib.errors import GateError
from stages.lib.loss import answer_nll, end_to_end
from stages.lib.schema.train import Train
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

    loss_is_scaled_for_ga = True  # by compute_loss; the trainer must not divide by the batches of a step again

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
        self.model_accepts_loss_kwargs = True  # so that labels are counted over a step, whatever the model's signature
        self.validation = validation
        self.tokens_seen = self.labels_seen = 0
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
        if self.tokens_seen == 0:
            self._check_start(inputs)
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
    def _check_start(self, inputs: dict[str, torch.Tensor]) -> None:
        """The adapter adds nothing yet, so that training has to start at the loss of the base.

        Compared without dropout and NEFTune's noise, which are of training and not of the start.
        """
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
