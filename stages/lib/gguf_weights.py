"""The weights of a GGUF file in a transformers model, dequantized."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from stages.lib.errors import ModelError

GEMMA3 = "gemma3_text"
"""transformers' name of a Gemma 3 without its eyes."""


class Reader(GGUFReader):  # type: ignore[misc]  # gguf brings no types
    """gguf's reader, four times as fast: a slice of a memory map costs more than all else it does, once per token."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))


def read(file: Path) -> Reader:
    """The head of a GGUF file and its tensors, parsed once for all that is asked of it.

    Raises: ModelError, when it is no whole GGUF file.
    """
    stat = file.stat()
    return _read(file.resolve(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> Reader:
    try:
        return Reader(file)
    except (ValueError, IndexError, KeyError) as fault:
        raise ModelError(f"{file.name}: cannot be read as a GGUF file: {fault}. Export it again.") from fault


def load(reader: GGUFReader, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The file's weights, dequantized, in a transformers model of that configuration.

    The names and permutations are those of transformers' own GGUF loader. `from_pretrained(gguf_file=...)` reads the
    vocabulary over and over: 14 seconds for the default model instead of 5, for the same weights (a test compares).

    Raises: ModelError, when weights are missing, or the file describes another architecture than the configuration.
    """
    architecture = architecture_of(reader)
    _check_description(reader, architecture, config)
    with no_init_weights():  # all of them are in the file
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    processor = processor_of(model, architecture)
    names = hugging_face_names(model, architecture)
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        found = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": weights},
        )
        if found.name in names:
            weights[names[found.name]] = torch.tensor(found.weights, dtype=model.dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if lost := sorted(set(missing) - tied) + unexpected:
        raise ModelError(f"GGUF file: {len(lost)} weights do not fit the configuration, such as {lost[0]}.")
    model.tie_weights()
    return model


def architecture_of(reader: GGUFReader) -> str:
    """llama.cpp's name of it."""
    return str(reader.fields["general.architecture"].contents())


def processor_of(model: PreTrainedModel, architecture: str) -> TensorProcessor:
    """What undoes the converter's reordering of an architecture's weights."""
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())


def hugging_face_names(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """GGUF's name of each weight -> transformers' name.

    transformers walks down the modules and lists the architecture's names anew in each, which takes seconds; the names
    from the top alone are the same wherever they name every weight.
    Args: architecture: llama.cpp's name, which need not be transformers': a Mistral is a `llama` there.
    Raises: ModelError, when transformers knows no GGUF of this architecture.
    """
    processor = processor_of(model, architecture)
    top = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(top, processor, architecture)
        if model.state_dict().keys() - names.values():
            names = get_gguf_hf_weights_map(model, processor, architecture)
    except NotImplementedError as fault:
        raise ModelError(
            f"{architecture}: transformers cannot load a GGUF file of it to measure it: {fault}. "
            "Leave the gguf formats out of export.formats."
        ) from fault
    return names


def complete(config: PreTrainedConfig) -> None:
    """Give a configuration read from a GGUF file what the format has no key for, as llama.cpp computes it."""
    if config.model_type == GEMMA3:
        config.query_pre_attn_scalar = _width_scored_by(config)


def _width_scored_by(config: Any) -> int:
    """Gemma 3 divides scores by the root of this: llama.cpp knows the 27B by its layers, and the others' head_dim."""
    return int(config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim)


def _check_gemma3(config: Any) -> None:
    """What llama.cpp computes of a Gemma 3 by itself, since GGUF has no key for it.

    Raises: ModelError, where the configuration says otherwise: answers would differ, without a word.
    """
    every_sixth = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(config.num_hidden_layers)]
    expected = {
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, _width_scored_by(config)),
        "layer_types": (config.layer_types, every_sixth),
        "rope_theta of sliding_attention": (config.rope_parameters["sliding_attention"]["rope_theta"], 10000.0),
    }
    for name, (found, known) in expected.items():
        if found != known:
            raise ModelError(
                f"models/base/config.json: {name} is {found}, llama.cpp takes {known} for every Gemma 3. Leave the "
                "gguf formats out of export.formats, or choose another base_model."
            )


def _check_description(reader: GGUFReader, architecture: str, config: PreTrainedConfig) -> None:
    """Compare the numbers by which llama.cpp will build the model with the configuration they came from."""
    if config.model_type == GEMMA3:
        _check_gemma3(config)
    for key, name in GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {}).items():
        field, expected = reader.fields.get(f"{architecture}.{key}"), getattr(config, name or "", None)
        if field is None or not isinstance(expected, (int, float)):
            continue
        found = field.contents()
        if isinstance(found, (int, float)) and abs(found - expected) > 1e-6 * abs(expected):
            raise ModelError(f"GGUF file: {architecture}.{key} is {found}, expected {name}={expected} as in training.")
