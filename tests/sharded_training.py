"""A training whose processes share the model, on CPUs: accelerate does so on GPUs only, and is told otherwise here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.lib.checkpoints import Checkpoints
from stages.lib.schema.numerics import Storage
from stages.lib.schema.train import Train
from tests import tiny_training

N = replace(tiny_training.NF4, quantized_storage=Storage.float32)


def fit(folder: Path, p: Train, points: Path) -> dict[str, Any]:
    """In each process: train as on a GPU, without what is quicker on a CPU.

    Returns: the losses, the adapter as numbers, and how much of a packed weight and of an adapter this process held.
    """
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState
    from peft import LoraConfig

    from stages.lib import adapters, chat, kernels, models, numerics, training

    as_it_is = AcceleratorState.__init__

    def shared(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        as_it_is(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = shared
    LoraConfig._register_custom_module = lambda self, mapping: None
    kernels.quicken = lambda model: None
    numerics.seed_everything(0, N)
    model = adapters.add_adapter(models.load_base(folder, N), tiny_training.LORA)
    tokenizer = chat.load_tokenizer(folder)
    trained = training.train(
        model,
        tiny_training.packs(tokenizer),
        tiny_training.packs(tokenizer, 3),
        p,
        tokenizer=tokenizer,
        stop_ids=chat.stop_ids(tokenizer, folder),
        resolved=numerics.resolve(N),
        seed=0,
        checkpoints=Checkpoints(points),
    )
    adapter = {name: values.flatten().tolist() for name, values in adapters.whole(model).items()}
    held = {}
    for name, parameter in model.named_parameters():
        if "layers.0.mlp.up_proj" in name:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            held[name.split("up_proj.")[1]] = local.numel() / parameter.numel()
    return {"curve": trained.curve, "metrics": trained.metrics, "adapter": adapter, "held": held}
