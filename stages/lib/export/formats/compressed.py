"""compressed-tensors for vLLM, written by llmcompressor, which pins another transformers: in an environment of its own.

vLLM's kernels for them need a GPU. What is measured here is the same arithmetic through transformers and
compressed-tensors in llmcompressor's environment: weights from the file, activations rounded where the format says so.
"""

import json
import tempfile
from pathlib import Path

from stages.lib import (
    apart,
    chat,
    compress,
    compressed_runtime,
    environment,
    fidelity,
    files,
    held_out,
    merging,
    records,
)
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import elsewhere
from stages.lib.export.formats.exporter import Exporter, Request, Session, Size, Trained
from stages.lib.schema.export import Format

ENVIRONMENT = ".venv-llmcompressor"
SCHEMES = {Format.compressed_w4a16: "W4A16", Format.compressed_w8a8: "W8A8"}
CALIBRATION_ROWS = 64
UNKNOWN = ("does not recognize this architecture", "Unrecognized model", "Unrecognized configuration class")


class Compressed(Exporter):
    runtime = "vLLM"
    measured_in = "transformers, compressed-tensors"

    def __init__(self, form: Format) -> None:
        self.form = form

    def absent(self) -> str | None:
        if python().is_file():
            return None
        return f"found no {ENVIRONMENT}, expected llmcompressor in an environment of its own: type `make env-vllm`"

    def file_name(self, name: str) -> str:
        return str(self.form)

    def write(self, trained: Trained, path: Path) -> None:
        """Quantize apart, with one thread: the sums of several would depend on their number."""
        with tempfile.TemporaryDirectory(dir=trained.scratch) as scratch:
            rows = Path(scratch) / "rows.json"
            rows.write_text(json.dumps(calibration(trained) if self.form is Format.compressed_w4a16 else []))
            arguments = (str(trained.merged.resolve()), str(path.resolve()), SCHEMES[self.form], str(rows.resolve()))
            try:
                apart.run(
                    f"writing {self.form}",
                    compress.__name__,
                    *arguments,
                    python=str(python()),
                    environment={"PIPELINE_ENV": elsewhere.prefix(str(python())), "OMP_NUM_THREADS": "1"},
                )
            except ExternalError as fault:
                if "no group of" in str(fault):
                    why = str(fault).splitlines()[-1]
                elif any(words in str(fault) for words in UNKNOWN):
                    why = "llmcompressor's transformers does not know this architecture"
                else:
                    raise
                found = files.read_json(trained.merged / "config.json")["architectures"][0]
                raise ModelError(
                    f"{trained.merged}: {why}, found {found}. Leave {self.form} out of export.formats."
                ) from fault
        merging.copy_unchanged(trained.merged, path)

    def size(self, path: Path, weights: int) -> Size:
        """Scales and 16-bit embeddings included."""
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        everything = sum(file.stat().st_size for file in path.iterdir())
        return Size(round(everything / 2**20, 2), round(stored * 8 / weights, 3))

    def log_probs(self, path: Path, trained: Trained) -> fidelity.LogProbs:
        return elsewhere.Model(path, compressed_runtime.__name__, python=str(python()))

    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        where = "transformers with compressed-tensors"
        return elsewhere.ask(where, compressed_runtime.__name__, path, request, python=str(python()))


def python() -> Path:
    return environment.root() / ENVIRONMENT / "bin" / "python"


def calibration(trained: Trained) -> list[list[int]]:
    """Token ids of training rows, every task represented, the choice fixed by the rows' ids."""
    tokenizer = chat.load_tokenizer(trained.merged)
    rows, _ = held_out.usable(tokenizer, records.read(trained.splits / "train.parquet"))
    chosen = held_out.spread(rows, CALIBRATION_ROWS)
    return [[int(token) for token in held_out.encode(tokenizer, row).input_ids] for row in chosen]
