"""A plain Hugging Face model folder: safetensors, tokenizer, chat template, and where all of it came from."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import _compile_jinja_template

from stages.lib import chat, files, gguf_weights, sentencepieces
from stages.lib.errors import ConfigError, ModelError
from stages.lib.schema.prompt import Use

# The file's `tokenizer.ggml.pre` names how text is cut before BPE. transformers cuts every one like GPT-2; for `smollm`
# that glues a blank to the first digit of "  12", which neither the original tokenizer nor llama.cpp does.
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@dataclass
class Facts:
    """What a folder holds: trainable and tied weights counted once."""

    parameters: int
    weight_bytes: int
    vocabulary: int
    files: int


def from_gguf(gguf: Path, folder: Path) -> str:
    """Dequantize a GGUF file into bfloat16 safetensors beside its tokenizer and chat template.

    Returns: the name of the quantization the weights came through, such as "Q4_1".
    Raises: ModelError, for a tokenizer whose pre-tokenizer has no rule here, or whose end of turn is not the model's.
    """
    reader = GGUFReader(gguf)
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(**place)  # handed on: every look at a GGUF header takes seconds
    gguf_weights.complete(config)
    tokenizer = AutoTokenizer.from_pretrained(**place, config=config)
    model = gguf_weights.load(reader, config, torch.bfloat16)
    if tokenizer.eos_token_id != model.config.eos_token_id:
        raise ModelError(
            f"{gguf.name}: its tokenizer ends a turn with id {tokenizer.eos_token_id}, its model with id "
            f"{model.config.eos_token_id}. Choose another base_model."
        )
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    if not sentencepieces.are_in(reader):
        tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(gguf, reader)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if sentencepieces.are_in(reader):
        sentencepieces.write(reader, folder)
    # How the tokenizer happened to be loaded is nothing that a reader of the folder needs.
    _drop_keys(folder / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path")
    _drop_keys(folder / "config.json", "_name_or_path", "_model_name_or_path")
    for file in folder.iterdir():
        file.chmod(0o644)
    return _quantization(reader)


def _pre_tokenizer(gguf: Path, reader: GGUFReader) -> Any:
    if (name := reader.fields["tokenizer.ggml.pre"].contents()) not in PRE_TOKENIZERS:
        raise ModelError(
            f"{gguf.name}: its pre-tokenizer is {name!r}, known here are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Choose the model from the hub instead (base_model.source=hub), whose tokenizer needs no conversion."
        )
    return PRE_TOKENIZERS[name]()


def _quantization(reader: GGUFReader) -> str:
    """What the file says it is; where it does not, the type that holds most of its weights."""
    if (field := reader.fields.get("general.file_type")) is not None:
        return LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return weights.most_common(1)[0][0]


def _drop_keys(file: Path, *keys: str) -> None:
    files.write_json(file, {key: value for key, value in files.read_json(file).items() if key not in keys})


def settle_chat_template(folder: Path, template: str, use: Use = Use.missing) -> str:
    """Give a folder the configured chat template: one without its own, or any when prompt.use is `always`.

    Where the tokenizer sets a BOS before a text and the template writes none, it is written first: the rows are
    tokenized without the tokenizer's own special tokens.

    Args: template: path of a Jinja file, from prompt.template.
    Returns: where the template came from, for source.json: "model" or the path.
    Raises: ConfigError, when the configured one is needed and prompt.template is no file, or no template.
    """
    config = files.read_json(folder / "tokenizer_config.json")
    own = [folder / f"chat_template.{kind}" for kind in ("jinja", "json")]
    if use is Use.missing and ("chat_template" in config or any(file.exists() for file in own)):
        return "model"
    path = Path(template)
    if not path.is_file():
        why = (
            "prompt.use is `always`"
            if use is Use.always
            else "The base model has no chat template of its own (no chat_template.jinja, nor in tokenizer_config.json)"
        )
        raise ConfigError(
            f"prompt.template: found {template!r}, which is no file. {why}, expected the path of a Jinja file to use "
            "instead."
        )
    text = path.read_text(encoding="utf-8").rstrip("\n")
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as fault:
        raise ConfigError(
            f"{template}:{fault.lineno}: {fault.message}. Correct the file that prompt.template names."
        ) from None
    if "bos_token" not in text and _sets_bos(folder):
        text = "{{- bos_token -}}" + text
    for file in own:
        file.unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    _drop_keys(folder / "tokenizer_config.json", "chat_template")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return template


def settle_stops(folder: Path) -> None:
    """Let generation_config.json name every token that ends an answer: runtimes other than this one read it there.

    A pretrained model names its end of text; the configured template may end a turn by another token.
    """
    path = folder / "generation_config.json"
    ends = chat.stop_ids(chat.load_tokenizer(folder), folder)
    config = files.read_json(path) if path.is_file() else {}
    if ends != _listed(config.get("eos_token_id")):
        files.write_json(path, config | {"eos_token_id": ends})


def _listed(ids: int | list[int] | None) -> list[int]:
    return sorted(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _sets_bos(folder: Path) -> bool:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return False  # `check` says what is wrong with it
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def check(folder: Path) -> Facts:
    """Prove that a folder can be loaded offline and without remote code, reading headers only.

    Raises: ModelError, naming the file: weights that are no safetensors or cut short, weights the index names and the
        folder lacks, an architecture transformers does not know, a tokenizer that does not load.
    """
    config = _read(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            f"config.json: auto_map asks for code of the model's own ({', '.join(sorted(config['auto_map']))}), "
            "which is never run here. Choose a base_model that transformers knows."
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder}: no *.safetensors. Choose a base_model whose weights are safetensors.")
    shapes: dict[str, list[int]] = {}
    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except SafetensorError as fault:
            raise ModelError(f"{file.name}: no readable safetensors file ({fault}). Run base_model again.") from fault
    if (index := folder / "model.safetensors.index.json").exists():
        absent = sorted(set(_read(index)["weight_map"]) - set(shapes))
        if absent:
            raise ModelError(f"{index.name}: names {absent[0]} and {len(absent) - 1} more that no weight file holds.")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as fault:
        raise ModelError(
            f"{folder}: transformers cannot load it ({str(fault).splitlines()[0]}). Choose another base_model."
        ) from fault
    return Facts(
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        weight_bytes=sum(file.stat().st_size for file in weights),
        vocabulary=len(tokenizer),
        files=sum(1 for file in folder.iterdir() if file.is_file()),
    )


def write_source(folder: Path, origin: dict[str, Any]) -> None:
    """Write source.json: the origin, and the sha256 of every other file of the folder."""
    sums = {file.name: files.sha256(file) for file in sorted(folder.iterdir()) if file.name != "source.json"}
    files.write_json(folder / "source.json", origin | {"files": sums})


def _read(file: Path) -> Any:
    try:
        return files.read_json(file)
    except FileNotFoundError:
        raise ModelError(f"{file.name}: missing. Choose a base_model that is a Hugging Face folder.") from None
    except json.JSONDecodeError as fault:
        raise ModelError(f"{file.name}:{fault.lineno}: no JSON ({fault.msg}). Choose another base_model.") from None
