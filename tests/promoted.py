"""A folder as quantize_export leaves it, of a few bytes, for the tests of what happens to it afterwards."""

from pathlib import Path
from typing import Any

from stages.lib.export import manifest
from stages.lib.measures import SCORES

CARD = """---
license: apache-2.0
base_model: tiny/llama
library_name: transformers
pipeline_tag: text-generation
---
# tiny
"""
SOURCE = {
    "id": "tiny/llama",
    "revision": "0" * 40,
    "origin": "tests",
    "license": "apache-2.0",
    "files": {"model.safetensors": "1" * 64},
}


def make_export(folder: Path, *, weights: bytes = b"GGUF weights") -> Path:
    """The export, with the adapter beside it and data two folders above; returns its folder."""
    adapter, splits = folder.with_name("adapter"), folder.parent.with_name("data") / "splits"
    for path, content in {
        adapter / "adapter_model.safetensors": b"adapter of " + weights,
        adapter / "adapter_config.json": b"{}",
        splits / "test.parquet": b"rows",
        folder / "tiny-Q8_0.gguf": weights,
        folder / "bnb/model.safetensors": b"more " + weights,
        folder / "README.md": CARD.encode(),
        folder / "LICENSE.md": b"free",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.write(
        folder,
        base=SOURCE,
        adapter=adapter,
        splits=splits,
        formats={"gguf_q8_0": {"mib": 1.0}, "bnb_nf4": {"mib": 1.0}},
        recommended="tiny-Q8_0.gguf",
        skipped={"onnx_int4": "onnxruntime-genai is not installed"},
    )
    return folder


def make_copy(folder: Path, **origin: object) -> Path:
    """A promoted copy of an export, in a folder beside it."""
    told = {"commit": "c" * 40, "is_dirty": False, "experiment": "rocky-dogs", "run_id": "r" * 32} | origin
    manifest.copy(folder, copy := folder.with_name("promoted"), told)
    return copy


def edit(folder: Path) -> None:
    """Change a shipped file behind the manifest's back."""
    (folder / "README.md").write_text(CARD + "edited\n")


def predictions(right: dict[str, int], *, rows: int = 24, first: int = 0) -> list[dict[str, Any]]:
    """Rows of predictions.parquet for each arm, of which the first `right[arm]` are answered right.

    Args: first: number of the first row; tables with another one are of another test set.
    """
    return [
        {
            "arm": arm,
            "id": f"{first + number:03}",
            "task": "parameters",
            "source": "tests",
            "language": None,
            "length": "short",
            "prompt_sha": "",
            "answer": "{}",
            "reference": "{}",
            "n_tokens": 4,
            "n_bytes": 12,
            "nll": 1.0,
            "new_tokens": 3,
            "stops": 1.0,
            "label": None,
            "predicted": None,
            **dict.fromkeys(SCORES),
            "field_f1": float(number < count),
        }
        for arm, count in right.items()
        for number in range(rows)
    ]
