"""Steps, tokens, arithmetic and time of a training before it starts; and how far off time and memory were, after it.

    seconds = operations of the matrix products / (what bare products reach x SHARE)

over the optimizer steps, the evaluations between them and the answers shown; memory is stages/lib/estimate.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from stages.lib import estimate, numerics, optimisation, packing, products
from stages.lib.estimate import Estimate, Range
from stages.lib.schema.lora import LOW_RANK, Lora, Method
from stages.lib.schema.train import Train

SHARE = {"cpu": (0.42, 0.53, 0.65), "cuda": (0.22, 0.42, 0.65)}
"""Of the speed of bare products that a training reaches: at the worst, probably, at best. On a CPU measured; on a GPU
what others measured of QLoRA on an A100, docs/estimates.md."""

DECODING = {"cpu": 40, "cuda": 200}
"""A step that adds one token to an answer reads every weight: it takes as long as a forward pass of so many tokens."""


@dataclass(frozen=True)
class Tokens:
    """Of a split as it is packed."""

    packs: int
    tokens: int
    labelled: int

    @classmethod
    def of(cls, packs: Sequence[packing.Pack]) -> "Tokens":
        labelled = sum(packing.trained_tokens(pack.labels) for pack in packs)
        return cls(len(packs), sum(len(pack.input_ids) for pack in packs), labelled)

    def share(self) -> float:
        return self.labelled / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Plan:
    """What a training will do. tokens, labelled: that it trains on, those of several epochs counted as often."""

    steps: int
    evaluations: int
    tokens: int
    labelled: int


def plan(found: Tokens, p: Train) -> Plan:
    """As the trainer counts: the last batch, and the last step, of an epoch may be smaller."""
    batches = math.ceil(found.packs / (p.batch_size * p.processes))
    per_epoch = max(1, math.ceil(batches / p.gradient_accumulation_steps))
    steps = math.ceil(p.epochs * per_epoch)
    passes = steps / per_epoch
    evaluations = len(optimisation.evaluations(p, steps))
    return Plan(steps, evaluations, round(passes * found.tokens), round(passes * found.labelled))


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the matrix products, for one token: forward, backward, and computed again."""

    forward: float
    backward: float
    again: float

    def step(self) -> float:
        return self.forward + self.backward + self.again

    def useful(self) -> float:
        """What the training needs, however it is done: nothing is computed again."""
        return self.forward + self.backward


def work(model: PreTrainedModel, lora: Lora, labelled: float, *, gradient_checkpointing: bool = False) -> Work:
    """Of one token of a training.

    2 for each weight forward; backward 2 through a frozen one, 4 through one that is trained; the head where a label
    is. Attention, norms and activations count as nothing.

    Args: model: without weights. labelled: share of the tokens that have a label.
    """
    frozen = sum(math.prod(size) for size in estimate.linear_layers(model).values())
    head = labelled * model.get_output_embeddings().weight.numel()
    trained = estimate.trainable_parameters(model, lora) if lora.method is Method.full else 0
    adapter = estimate.trainable_parameters(model, lora) if lora.method in LOW_RANK else 0
    forward = 2.0 * (frozen + adapter + head)
    return Work(
        forward,
        forward + 2.0 * (adapter + min(trained, frozen)),
        2.0 * (frozen + adapter) if gradient_checkpointing else 0.0,
    )


def seconds(
    model: PreTrainedModel, lora: Lora, p: Train, train: Tokens, validation: Tokens, *, device: str, limit: float
) -> Range:
    """Of a training: from its first step to the best adapter, put back and evaluated again.

    Several processes share the steps evenly, and are taken to lose nothing by waiting for each other.

    Args: model: without weights. limit: operations a second that bare products reach on the device of one process.
    """
    foreseen = plan(train, p)
    step = work(model, lora, train.share(), gradient_checkpointing=p.gradient_checkpointing).step()
    evaluated = work(model, lora, validation.share()).forward
    operations = foreseen.tokens * step / p.processes + (foreseen.evaluations + 1) * validation.tokens * evaluated
    decoded = foreseen.evaluations * p.sample_tokens if p.samples else 0
    operations += decoded * DECODING[device] * work(model, lora, 0.0).forward
    low, expected, high = SHARE[device]
    return Range(*(operations / (limit * share) for share in (high, expected, low)))


def limit_here(model: PreTrainedModel, resolved: numerics.Resolved, tokens: int) -> float:
    """Operations a second that bare products reach on this machine, measured for about a second.

    Args: model: without weights. tokens: of a batch.
    """
    return 1e9 * products.gflop_per_second(model, resolved, tokens, rounds=3, calls=3)


@dataclass(frozen=True)
class Expected:
    """What was expected of a training before it began: bytes, and seconds."""

    memory: Range
    seconds: Range
    limit: float

    def beside(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The estimate and its error, as a share of what was measured, for the record of the run; says both.

        Time is left out where this process did not do every step: it went on from where another was, or ended early.
        """
        found = {
            "estimate/memory_mib": round(self.memory.expected / 2**20),
            "estimate/seconds": round(self.seconds.expected, 1),
            "estimate/limit_gflop_per_second": round(self.limit / 1e9, 1),
        }
        peak = measured["train/peak_memory_mib"]
        found["estimate/memory_error"] = round(self.memory.expected / 2**20 / peak - 1, 3)
        said = f"memory: estimated {found['estimate/memory_mib']} MiB, measured {peak} MiB"
        print(f"{said} ({found['estimate/memory_error']:+.0%})")
        if measured["train/steps_in_full"]:
            spent = measured["train/seconds"]
            found["estimate/seconds_error"] = round(self.seconds.expected / spent - 1, 3)
            said = f"time: estimated {self.seconds.expected:.0f} s, measured {spent:.0f} s"
            print(f"{said} ({found['estimate/seconds_error']:+.0%})")
        return found


def expect(
    model: PreTrainedModel,
    lora: Lora,
    p: Train,
    memory: Estimate,
    packs: Sequence[packing.Pack],
    validation: Sequence[packing.Pack],
    resolved: numerics.Resolved,
) -> Expected:
    """Memory as it was estimated, and time on this machine.

    Args: model: without weights.
    """
    train = Tokens.of(packs)
    tokens = max(1, round(p.batch_size * train.tokens / train.packs))
    limit = limit_here(model, resolved, tokens)
    spent = seconds(model, lora, p, train, Tokens.of(validation), device=resolved.device, limit=limit)
    is_gpu = resolved.device == "cuda"  # where the peak that is measured is that of tensors
    return Expected(memory.of_tensors() if is_gpu else memory.total(), spent, limit)
