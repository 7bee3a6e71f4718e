"""Stage qlora_train: train a LoRA adapter on the frozen 4-bit base.

Reads data/packed and models/base; writes models/adapter (the best checkpoint as PEFT reads it, trained.json,
samples.jsonl), plots/train.csv and metrics/qlora_train.json.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib import chat, checkpoints, files, launching, numerics, packing, stage, tracking
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.train import Train

if TYPE_CHECKING:
    from stages.lib.watching import Trained


@dataclass
class Params:
    seed: int
    lora: Lora
    train: Train
    numerics: Numerics


def main(p: Params) -> None:
    resolved = numerics.resolve(p.numerics)
    print(resolved.reason)
    determining = asdict(p) | {"resolved": asdict(resolved), "arithmetic": numerics.arithmetic()}
    with checkpoints.claimed(checkpoints.key("qlora_train", determining)) as points:
        trained = launching.launch(train, vars(p), points.folder, processes=p.train.processes, device=resolved.device)
        files.write_csv(Path("plots/train.csv"), trained.curve)
        tracking.report("qlora_train", trained.metrics, trained.measured)
        points.remove()


def train(given: Mapping[str, Any], points: Path) -> "Trained":
    """In each process: load, train, and in the first one write the adapter.

    Args: given: the fields of Params. points: the folder of resume points, claimed.
    """
    p = Params(**given)
    # transformers 5.23 has renamed gradient_checkpointing; TRL 1.16 and PEFT 0.21 use the old name
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from stages.lib import adapters, cost, estimate, models, training  # torch, once numerics are settled

    base = Path("models/base")
    packs, validation = (packing.read(Path("data/packed") / split) for split in ("train", "validation"))
    resolved = numerics.resolve(p.numerics)
    skeleton = estimate.skeleton(base)
    memory = estimate.check(skeleton, p.lora, p.train, p.numerics, packs)
    expected = cost.expect(skeleton, p.lora, p.train, memory, packs, validation, resolved)
    tokenizer = chat.load_tokenizer(base)
    model = models.load_base(base, p.numerics)
    numerics.seed_everything(p.seed, p.numerics)  # before the adapter is drawn, not when the trainer starts
    model = adapters.add_adapter(model, p.lora)
    trained = training.train(
        model,
        packs,
        validation,
        p.train,
        tokenizer=tokenizer,
        stop_ids=chat.stop_ids(tokenizer, base),
        resolved=resolved,
        seed=p.seed,
        checkpoints=checkpoints.Checkpoints(points),
    )
    values = adapters.whole(model)
    if launching.is_first():
        trained.measured |= expected.beside(trained.measured)
        with files.replacing(Path("models/adapter")) as folder:
            adapters.save(model, folder, values)
            described = adapters.describe(model, p.lora, resolved) | {"ended": trained.ended}
            files.write_json(folder / "trained.json", described)
            files.write_jsonl(folder / "samples.jsonl", trained.samples)
    return trained


if __name__ == "__main__":
    stage.run("qlora_train", main, Params, start=launching.start)
