"""Merge an adapter into ordinary weights: each in float32, one at a time, never in place on quantized ones.

method          merged
low rank        W + s B A; dora: its rows scaled to the lengths that were learned
ia3             W, its rows scaled, or its columns where the layer scales what goes in
trained whole   the trained weights

merge.base      W
dequantized     models/base through numerics.quantization and back, the values the adapter was trained on
original        models/base as it is

Several adapters (merge.adapters) become one first, combined by PEFT; everything after knows that one alone.
"""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.lib import adapters, chat, files, licences, models, others
from stages.lib.errors import ConfigError, ModelError
from stages.lib.requantizing import Requantized
from stages.lib.schema.merge import OF_EQUAL_RANK, Base, Dtype, Merge
from stages.lib.schema.numerics import Numerics

SHARD = "5GB"
"""Most that one weight file of a merged model holds, as on the hub."""


def check(adapter: Path, p: Merge) -> None:
    """All that can be known to be wrong with the adapters without loading a model.

    Raises: ConfigError, for virtual tokens, or adapters that cannot be combined. ModelError, for an adapter that is
        torn, holds NaN, or is not the one that was configured.
    """
    others.check(p.adapters, "merge.adapters")
    configs = {"models/adapter": _config(adapter)}
    configs |= {name: _config(Path(entry["path"])) for name, entry in sorted(p.adapters.items())}
    method = configs["models/adapter"]["peft_type"]
    if method in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise ConfigError(
            f"lora.method: {adapter} holds virtual tokens ({method.lower()}), which stand before a prompt and cannot "
            "be merged into weights, expected another method for merge and quantize_export. Stop at `dvc repro "
            "evaluate`, serve models/base with models/adapter through PEFT, or train lora.method=lora."
        )
    for folder in (adapter, *(Path(entry["path"]) for _, entry in sorted(p.adapters.items()))):
        try:
            is_finite = all(tensor.isfinite().all() for tensor in load_file(folder / models.WEIGHTS).values())
        except (OSError, SafetensorError) as fault:
            raise ModelError(
                f"{folder / models.WEIGHTS}: no readable safetensors file ({fault}). Run qlora_train again."
            ) from fault
        if not is_finite:
            raise ModelError(f"{folder}: holds NaN or infinity. Lower train.learning_rate and run qlora_train again.")
    if p.adapters:
        _check_combinable(configs, p)


def _config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found, expected an adapter. Run qlora_train, or correct merge.adapters.")
    found: dict[str, Any] = files.read_json(path)
    return found


def _check_combinable(configs: Mapping[str, Mapping[str, Any]], p: Merge) -> None:
    """PEFT combines A and B of plain LoRA; magnitudes of DoRA, biases and whole modules it drops or refuses late."""
    faults = []
    for name, config in configs.items():
        more = [key for key in ("use_dora", "modules_to_save", "target_parameters") if config.get(key)]
        if config["peft_type"] != "LORA" or more or config.get("bias", "none") != "none":
            kind = "+".join([config["peft_type"].lower(), *more])
            faults.append(f"{name} is {kind} with bias={config.get('bias', 'none')}, expected plain LoRA")
    ranks = {name: config.get("r") for name, config in configs.items()}
    if not faults and p.combination in OF_EQUAL_RANK and len(set(ranks.values())) > 1:
        faults.append(f"ranks are {ranks}, expected equal ones for merge.combination={p.combination}; cat takes any")
    if faults:
        raise ConfigError("merge.adapters: cannot be combined:\n  " + "\n  ".join(faults))


@contextmanager
def combined(base: Path, adapter: Path, p: Merge) -> Iterator[Path]:
    """The folder of the adapter that is merged: the run's own, or for this block one that PEFT makes of several.

    Combined on the CPU and drawn from merge.seed, so that every reader of it sees the same values.

    Raises: as `check`; ModelError, when an adapter does not fit the base.
    """
    check(adapter, p)
    if not p.adapters:
        yield adapter
        return
    entries = [(adapter, p.weight), *((Path(e["path"]), e["weight"]) for _, e in sorted(p.adapters.items()))]
    frozen = _shapes_of(base)
    names = [f"adapter_{place}" for place in range(len(entries))]
    model = None
    for name, (folder, _) in zip(names, entries, strict=True):
        try:
            if model is None:
                model = PeftModel.from_pretrained(frozen, folder, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError, KeyError) as fault:
            raise ModelError(f"{folder}: does not fit models/base: {fault}. Correct merge.adapters.") from fault
        models.check_complete(model, folder, load_file(folder / models.WEIGHTS), name)
    assert model is not None
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as scratch:
        torch.manual_seed(p.seed)
        model.base_model.add_weighted_adapter(
            names, [weight for _, weight in entries], "combined", str(p.combination), density=p.density
        )
        model.save_pretrained(scratch, selected_adapters=["combined"], save_embedding_layers=False)
        folder = Path(scratch) / "combined"
        path = folder / "adapter_config.json"
        config = files.read_json(path) | {"base_model_name_or_path": "models/base"}
        # The combined A and B hold every scaling already; PEFT keeps the first adapter's rsLoRA, which scales again.
        config |= {"use_rslora": False, "lora_alpha": config["r"], "target_modules": sorted(config["target_modules"])}
        files.write_json(path, config)
        del model, frozen
        yield folder


def _shapes_of(base: Path) -> PreTrainedModel:
    """The base with zeros for weights, which take no memory: it says where an adapter sits, and whether it fits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False))
    return model


def trained(base: Path, adapter: Path, p: Merge, n: Numerics, *, dense: bool = False) -> PeftModel:
    """The trained model, which everything that ships is measured against: models.load_tuned with the combined adapter.

    Raises: as `combined`.
    """
    with combined(base, adapter, p) as folder:
        return models.load_tuned(base, folder, n, dense=dense)


def merge(base: Path, adapter: Path, p: Merge, n: Numerics) -> PreTrainedModel:
    """The merged model in merge.dtype, an ordinary transformers model without a trace of PEFT, on the CPU.

    Layer by layer, each result in the place of the weight it was made of: with 16-bit weights in the base's files and a
    16-bit merge.dtype, the memory is that of the model, the adapter, and some copies of one layer.

    Raises: ConfigError, when the method cannot be merged. ModelError, when the adapter does not fit, is torn,
        holds NaN, or changes nothing, or when a weight is too large for merge.dtype.
    """
    with combined(base, adapter, p) as folder:
        tuned = models.load_mergeable(base, folder, n)
        if not changes_something(tuned):
            raise ModelError(
                f"{adapter}: its update of every weight is zero, so the merged model would be the base. "
                "Train longer or with another train.learning_rate."
            )
        if not _merge_layers(tuned, Requantized(base, n) if p.base is Base.dequantized else None, p.dtype):
            raise ModelError(
                f"{adapter}: its update of every weight is lost in {p.dtype}, so the merged model would be the base. "
                "Set merge.dtype=float32, or train longer."
            )
        return tuned.merge_and_unload()  # modules trained whole; nothing else is left


def changes_something(tuned: PeftModel) -> bool:
    """Does the adapter move any weight at all?"""
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            found = bool(layer.get_delta_weight(adapters.NAME).any())
        elif isinstance(layer, IA3Layer):
            found = bool((layer.ia3_l[adapters.NAME] != 1).any())
        elif isinstance(layer, ModulesToSaveWrapper):
            found = _differs(layer)
        else:
            continue
        if found:
            return True
    return False


def _differs(layer: ModulesToSaveWrapper) -> bool:
    """Is a module that was trained whole another one than the base's?"""
    pairs = zip(layer.modules_to_save[adapters.NAME].parameters(), layer.original_module.parameters(), strict=True)
    return any(not torch.equal(one, other.to(one.dtype)) for one, other in pairs)


def _merge_layers(tuned: PeftModel, through: Requantized | None, dtype: Dtype) -> bool:
    """Merge every adapted layer and bring all weights to `dtype`, in place. Returns: is any another than before?"""
    model = tuned.get_base_model()
    target = getattr(torch, dtype)
    settled, is_moved = set(), False
    for name, layer in list(model.named_modules()):
        is_adapted = isinstance(layer, LoraLayer | IA3Layer)
        is_quantized = through is not None and name in through.names
        if not (is_adapted or is_quantized):
            continue
        plain = layer.get_base_layer() if is_adapted else layer
        stored = {key: parameter.data for key, parameter in plain.named_parameters(recurse=False)}
        for parameter in plain.parameters(recurse=False):
            parameter.data = parameter.data.float()
        if through is not None and is_quantized:
            plain.weight.data = through.values(name, stored["weight"])
        if is_adapted:
            before = plain.weight.data.to(target, copy=True)
            layer.merge()
            is_moved |= not torch.equal(before, plain.weight.data.to(target))
            model.set_submodule(name, plain)
        for key, parameter in plain.named_parameters(recurse=False):
            parameter.data = _put(stored[key], parameter.data, target, f"{name}.{key}")
            settled.add(id(parameter))
        _return_freed_memory()
    for name, parameter in model.named_parameters():
        if id(parameter) not in settled:
            parameter.data = _put(parameter.data, parameter.data, target, name)
    return is_moved or any(isinstance(layer, ModulesToSaveWrapper) and _differs(layer) for layer in model.modules())


def _put(place: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The value as `dtype`, in the memory of `place` where it fits there."""
    found = value.to(dtype)
    if not found.isfinite().all():
        raise ModelError(
            f"{name}: does not fit into {str(dtype).removeprefix('torch.')}, expected finite numbers. "
            "Set merge.dtype=bfloat16."
        )
    return place.view(dtype).copy_(found) if place.dtype.itemsize == dtype.itemsize else found


def _return_freed_memory() -> None:
    """Let glibc hand back what freed tensors left in its heap: unasked it kept more than the model itself takes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def save(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write a Hugging Face folder that needs no other: weights, tokenizer, template, generation config."""
    model.config._name_or_path = ""
    model.save_pretrained(folder, max_shard_size=SHARD)
    chat.load_tokenizer(base).save_pretrained(folder)
    copy_unchanged(base, folder)


def copy_unchanged(base: Path, folder: Path) -> None:
    """What says how text becomes tokens and when to stop, and the licence: byte for byte, not as re-saved."""
    texts = ("tokenizer*", "special_tokens_map.json", "chat_template.*", "generation_config.json")
    for pattern in (*texts, *licences.FILES):
        for path in sorted(base.glob(pattern)):
            (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.iterdir():
        path.chmod(0o644)


def weights_mib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20, 2)
