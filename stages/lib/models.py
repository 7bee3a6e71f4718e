"""The one place that loads models: the base as in training, base with adapter, and ordinary 16-bit folders.

Nothing here runs code of a model folder, reaches the network or reads a pickle.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from stages.lib import activations, adapters, files, numerics, unpacking
from stages.lib.adapters import NAME
from stages.lib.chat import load_tokenizer
from stages.lib.errors import ModelError
from stages.lib.schema.numerics import ComputeDtype, Device, Numerics, Quantization

WEIGHTS = "adapter_model.safetensors"
__all__ = ["load_base", "load_dense", "load_several", "load_tokenizer", "load_tuned"]


def load_base(folder: Path, n: Numerics, *, dense: bool = False) -> PreTrainedModel:
    """The frozen base, held as n.quantization says: 4-bit in blocks of 64, their scales quantized again when
    n.double_quantization; 8-bit by rows; or at the compute type.

    Args: folder: 16-bit weights, quantized while loading, or a folder whose config.json says it is 4-bit already.
        dense: the values of 4-bit layers as ordinary Linear layers in the compute type; on CPU equal to the bit, and
        faster where weights are used more often than they are worth unpacking. 8-bit layers stay: they round their
        inputs, too.
    Raises: ModelError, when the folder is no model, or holds no safetensors.
    """
    resolved = numerics.resolve(n)
    compute = getattr(torch, resolved.compute_dtype)
    recipe = {}
    if n.quantization is not Quantization.none and "quantization_config" not in _config(folder):
        recipe["quantization_config"] = quantized(n, compute)
    model = _from_folder(folder, resolved, **recipe)
    if getattr(model, "is_loaded_in_8bit", False):
        # It says so at every product that float32 goes in and float16 is rounded.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if "quantization_config" in _config(folder):
        _compute_in(model, compute)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # On CPUs with AVX512_BF16, bitsandbytes 0.50.2 repacks a weight at the first forward in eval mode, into a
            # form that has no backward: the gradients of every later step are wrong, without a word. Not here.
            layer.support_avx512bf16_for_cpu = False
    is_4_bit = getattr(model, "is_loaded_in_4bit", False)
    return unpacking.densify(model, compute) if dense and is_4_bit else model


def quantized(n: Numerics, compute: torch.dtype) -> BitsAndBytesConfig:
    """n.quantization in the words of bitsandbytes."""
    if n.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(n.quantization),
        bnb_4bit_use_double_quant=n.double_quantization,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=str(n.quantized_storage),
    )


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what a quantized folder holds unquantized (embeddings, norms) the compute type, not its own 16 bit."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = dtype
    model.config.dtype = dtype


def load_tuned(base: Path, adapter: Path, n: Numerics, *, dense: bool = False) -> PeftModel:
    """The base with its trained adapter, in eval mode; `with model.disable_adapter()` gives the base.

    Raises: ModelError, when the adapter's tensors are not exactly the ones its configuration asks for.
    """
    _check_adapter(adapter)
    model = _with_adapter(load_base(base, n, dense=dense), adapter, numerics.resolve(n))
    adapters.keep_types(model)
    return model


def load_several(base: Path, folders: Mapping[str, Path], n: Numerics, *, dense: bool = False) -> PeftModel:
    """The base with several adapters side by side, by the names PEFT is to call them; `set_adapter` chooses one.

    Raises: ModelError, as load_tuned, or when adapters of these kinds cannot stand side by side.
    """
    for folder in folders.values():
        _check_adapter(folder)
    model = load_base(base, n, dense=dense)
    for name, folder in folders.items():
        model = _with_adapter(model, folder, numerics.resolve(n), name)
        adapters.keep_types(model, name)
    return model


def load_mergeable(base: Path, adapter: Path, n: Numerics) -> PeftModel:
    """The base in ordinary weights on the CPU, with the adapter in float32; for its weights, not to compute with.

    The weights have the type their files have and lie in these files' pages until they are written to, for this process
    alone. A folder that is quantized already gives the values it stands for, in float32.
    """
    _check_adapter(adapter)
    plain = replace(numerics.resolve(n), device="cpu", compute_dtype="float32", adapter_dtype="float32")
    if "quantization_config" not in _config(base):
        frozen = _from_folder(base, replace(plain, compute_dtype=_stored_dtype(base)))
    else:
        frozen = load_base(base, replace(n, device=Device.cpu, compute_dtype=ComputeDtype.float32), dense=True)
        if getattr(frozen, "is_loaded_in_8bit", False):
            frozen = frozen.dequantize(torch.float32)
            frozen.is_loaded_in_8bit = False  # PEFT looks at this mark
    return _with_adapter(frozen, adapter, plain)


def _stored_dtype(folder: Path) -> str:
    """The type of all weights in a folder's files; float32, which holds the values of any, when there are several."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return {("BF16",): "bfloat16", ("F16",): "float16"}.get(tuple(found), "float32")


def _check_adapter(adapter: Path) -> None:
    if not all((adapter / name).is_file() for name in (WEIGHTS, "adapter_config.json")):
        raise ModelError(f"{adapter}: no adapter found, expected {WEIGHTS} and adapter_config.json. Run qlora_train.")


def _with_adapter(
    frozen: PreTrainedModel | PeftModel, adapter: Path, resolved: numerics.Resolved, name: str = NAME
) -> PeftModel:
    """PEFT's loading, made strict: by itself it warns of missing tensors, and passes over those it does not know.

    Args: frozen: what it is added to, a base or one that has other adapters.
    """
    known = set(map(id, frozen.parameters()))
    how: dict[str, Any] = {"torch_device": resolved.device, "autocast_adapter_dtype": False}
    model = frozen
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, name, **how)
        else:
            model = PeftModel.from_pretrained(frozen, adapter, name, **how)
    except (RuntimeError, ValueError, KeyError) as fault:
        raise ModelError(f"{adapter}: does not fit models/base: {fault}. Run qlora_train again.") from fault
    stored = load_file(adapter / WEIGHTS)
    check_complete(model, adapter, stored, name)
    for parameter in model.parameters():
        if id(parameter) not in known:
            parameter.data = parameter.data.to(getattr(torch, resolved.adapter_dtype))
    if any(tensor.dtype != frozen.dtype for tensor in stored.values()):
        set_peft_model_state_dict(model, stored, name)  # PEFT made them in the base's type, which may have rounded them
    return model.eval()


def check_complete(model: PeftModel, adapter: Path, stored: Mapping[str, torch.Tensor], name: str = NAME) -> None:
    """Hold the tensors of an adapter's file to those that its configuration asks for.

    Raises: ModelError, naming tensors that are missing or left over.
    """
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if stored.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        raise ModelError(
            f"{adapter / WEIGHTS}: {len(missing)} tensors missing {missing[:2]}, {len(unexpected)} unexpected "
            f"{unexpected[:2]}, expected the {len(expected)} that adapter_config.json describes for models/base. "
            "Run qlora_train again."
        )


def load_dense(folder: Path, n: Numerics) -> PreTrainedModel:
    """An ordinary Hugging Face folder (16-bit base, merged model) in the compute type, in eval mode.

    Raises: ModelError, when the folder is no model, holds no safetensors, or is quantized.
    """
    if "quantization_config" in _config(folder):
        raise ModelError(f"{folder}: weights are quantized, expected 16 or 32 bit. Use load_base for a 4-bit folder.")
    return _from_folder(folder, numerics.resolve(n))


def _from_folder(folder: Path, resolved: numerics.Resolved, **more: object) -> PreTrainedModel:
    disable_progress_bar()  # hundreds of lines for a load of seconds
    numerics.start_vector_math()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, resolved.compute_dtype),
            device_map={"": torch.cuda.current_device() if resolved.device == "cuda" else resolved.device},
            attn_implementation="sdpa",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            **more,
        )
    except (OSError, ValueError) as fault:
        raise ModelError(f"{folder}: cannot load a causal language model from it: {fault}") from fault
    if (folder / "tokenizer.json").is_file():
        _make_room(model, Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())
    if model.device.type == "cpu":
        activations.steady(model)
    return model.eval()


def _make_room(model: PreTrainedModel, n_tokens: int) -> None:
    """Give tokens that the tokenizer has and the model has not the mean of all others, as embedding and in the head.

    They learn with lora.modules_to_save=[embed_tokens, lm_head].
    """
    known = model.get_input_embeddings().num_embeddings
    if n_tokens <= known:
        return
    print(f"{n_tokens - known} new tokens from id {known} on start at the mean of the {known} that the model knows")
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight.data[known:] = module.weight.data[:known].float().mean(0)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found, expected a Hugging Face model folder. Run the stage base_model.")
    return files.read_json(path)
