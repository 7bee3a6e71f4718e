"""ONNX Runtime GenAI: matrices of four bits in blocks of 32, the sensitive ones of eight, in a graph of ONNX.

Its tokenizer is the runtime's own: with SmolLM2 it divides spaces in front of a digit otherwise than training did,
which the round trip of quantize_export refuses. Token ids made elsewhere may be given to the same files.
"""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from stages.lib import apart, chat, fidelity, files, merging, onnx_runtime
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import elsewhere
from stages.lib.export.formats.exporter import Exporter, Request, Session, Size, Trained

BUILDER = "onnxruntime_genai.models.builder"
NEEDED = ("onnxruntime_genai", "onnx", "onnx_ir")
# k_quant_mixed: llama.cpp's choice of scales, and eight bits for the embeddings and the layers llama.cpp gives more.
# Measured on SmolLM2-135M (mean KL, MiB): default 0.60, 84; k_quant 0.38, 86; k_quant_last 0.29, 100; this 0.19, 109.
OPTIONS = ("algo_config=k_quant_mixed", "hf_token=false", "hf_remote=false")


class Int4(Exporter):
    runtime = measured_in = "ONNX Runtime GenAI"

    def absent(self) -> str | None:
        missing = [name for name in NEEDED if find_spec(name) is None]
        if not missing:
            return None
        return (
            f"found no {', '.join(missing)}, expected pyproject's extra `onnx`: type `uv pip install --constraints "
            "requirements.lock --requirements pyproject.toml --extra onnx`"
        )

    def file_name(self, name: str) -> str:
        return "onnx_int4"

    def write(self, trained: Trained, path: Path) -> None:
        """Build the graph, then put beside it what training had: the tokenizer to the byte, and where to stop."""
        with tempfile.TemporaryDirectory(dir=trained.scratch) as cache:
            where = ("-i", str(trained.merged.resolve()), "-o", str(path.resolve()), "-c", cache)
            try:
                apart.run(
                    f"writing {path.name}",
                    BUILDER,
                    *where,
                    *("-p", "int4", "-e", "cpu", "--extra_options", *OPTIONS),
                    environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
                )
            except ExternalError as fault:
                if "not currently supported" not in str(fault):
                    raise
                architecture = files.read_json(trained.merged / "config.json")["architectures"][0]
                raise ModelError(
                    f"{trained.merged}: ONNX Runtime GenAI's builder does not know this architecture, found "
                    f"{architecture}. Leave onnx_int4 out of export.formats."
                ) from fault
        merging.copy_unchanged(trained.merged, path)
        config = files.read_json(path / "genai_config.json")
        stops = chat.stop_ids(chat.load_tokenizer(trained.merged), trained.merged)
        config["model"]["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        files.write_json(path / "genai_config.json", config)

    def size(self, path: Path, weights: int) -> Size:
        """Graph, scales and tables of positions included. A fallback is a product whose matrix has 32 bits still."""
        import onnx

        stored = sum(file.stat().st_size for file in path.glob("*.onnx*"))
        everything = sum(file.stat().st_size for file in path.iterdir())
        graph = onnx.load(path / "model.onnx", load_external_data=False).graph
        wide = sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)
        return Size(round(everything / 2**20, 2), round(stored * 8 / weights, 3), wide)

    def log_probs(self, path: Path, trained: Trained) -> fidelity.LogProbs:
        """All logits of the graph as it computes them, activations of eight bits included."""
        try:
            model = onnx_runtime.load(str(path), torch.get_num_threads())
        except RuntimeError as fault:
            raise ModelError(
                f"{path}: ONNX Runtime GenAI does not load it: {fault}. Run quantize_export again."
            ) from fault

        def log_probs(row: Sequence[int], start: int) -> torch.Tensor:
            logits = onnx_runtime.begin(model, list(row[:-1]), len(row)).get_output("logits")[0, start - 1 :]
            return torch.from_numpy(logits.copy()).float().log_softmax(dim=-1)

        return log_probs

    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        return elsewhere.ask(self.runtime, onnx_runtime.__name__, path, request)
