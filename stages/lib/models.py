"""The one place that loads models: the base as in training, base with adapter, and ordinary 16-bit folders.

Nothing here runs code of a model folder, reaches the network or reads a pickle.
"""

import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from stages.lib import activations, adapters, files, numerics, unpacking
from stages.lib.chat import load_tokenizer
from stages.lib.errors import ModelError
from stages.lib.schema.numerics import Numerics, Quantization

WEIGHTS = "adapter_model.safetensors"
__all__ = ["load_base", "load_dense", "load_tokenizer", "load_tuned"]


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
        recipe["quantization_config"] = _quantized(n, compute)
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


def _quantized(n: Numerics, compute: torch.dtype) -> BitsAndBytesConfig:
    """n.quantization in the words of bitsandbytes."""
    if n.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(n.quantization),
        bnb_4bit_use_double_quant=n.double_quantization,
        bnb_4bit_compute_dtype=compute,
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
    return _with_adapter(load_base(base, n, dense=dense), adapter, n)


def load_mergeable(base: Path, adapter: Path, n: Numerics) -> PeftModel:
    """load_tuned in ordinary weights throughout: the values of 8-bit layers, too, though not how these round inputs."""
    _check_adapter(adapter)
    frozen = load_base(base, n, dense=True)
    if getattr(frozen, "is_loaded_in_8bit", False):
        frozen = frozen.dequantize(getattr(torch, numerics.resolve(n).compute_dtype))
        frozen.is_loaded_in_8bit = False  # PEFT looks at this mark
    return _with_adapter(frozen, adapter, n)


def _check_adapter(adapter: Path) -> None:
    if not all((adapter / name).is_file() for name in (WEIGHTS, "adapter_config.json")):
        raise ModelError(f"{adapter}: no adapter found, expected {WEIGHTS} and adapter_config.json. Run qlora_train.")


def _with_adapter(frozen: PreTrainedModel, adapter: Path, n: Numerics) -> PeftModel:
    """PEFT's loading, made strict: by itself it warns of missing tensors, and passes over those it does not know."""
    resolved = numerics.resolve(n)
    known = set(map(id, frozen.parameters()))
    try:
        model = PeftModel.from_pretrained(frozen, adapter, torch_device=resolved.device, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, KeyError) as fault:
        raise ModelError(f"{adapter}: does not fit models/base: {fault}. Run qlora_train again.") from fault
    stored = load_file(adapter / WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if stored.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        raise ModelError(
            f"{adapter / WEIGHTS}: {len(missing)} tensors missing {missing[:2]}, {len(unexpected)} unexpected "
            f"{unexpected[:2]}, expected the {len(expected)} that adapter_config.json describes for models/base. "
            "Run qlora_train again."
        )
    for parameter in model.parameters():
        if id(parameter) not in known:
            parameter.data = parameter.data.to(getattr(torch, resolved.adapter_dtype))
    adapters.keep_types(model)
    return model.eval()


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
            device_map={"": resolved.device},
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
