"""The SentencePiece model of a GGUF file, written as its makers publish it: llama.cpp's converter reads no other."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from sentencepiece import sentencepiece_model_pb2

from stages.lib import files

NAME = "tokenizer.model"
BLANK = "\u2581"


def are_in(reader: GGUFReader) -> bool:
    """Whether the file's vocabulary is one of SentencePiece, with a score for each piece, and not byte-level BPE."""
    return bool(reader.fields["tokenizer.ggml.model"].contents() == "llama")


def write(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.model, and name in tokenizer_config.json the tokens that are cut out of a text before all else.

    GGUF numbers the kinds of tokens as SentencePiece does. The converter takes user-defined ones from
    tokenizer_config.json alone; transformers takes all added ones from there, where one is named.
    """
    pieces, scores, kinds = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    unknown = reader.fields["tokenizer.ggml.unknown_token_id"].contents()
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # its classes are made at import
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = TokenType.BYTE in kinds
    for name in ("bos", "eos", "unknown", "padding"):
        field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        number = -1 if field is None else field.contents()
        short = {"unknown": "unk", "padding": "pad"}.get(name, name)
        setattr(model.trainer_spec, f"{short}_id", number)
        if number >= 0:
            setattr(model.trainer_spec, f"{short}_piece", pieces[number])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = _sets(reader, "add_space_prefix")
    model.normalizer_spec.remove_extra_whitespaces = False
    added: dict[str, dict[str, Any]] = {}
    for number, (text, score, kind) in enumerate(zip(pieces, scores, kinds, strict=True)):
        piece = text.replace(" ", BLANK)  # llama.cpp writes the blanks of a user-defined one as such
        model.pieces.add(piece=piece, score=score, type=TokenType.UNKNOWN if number == unknown else kind)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            added[str(number)] = {"content": piece, "special": kind == TokenType.CONTROL} | flags
    (folder / NAME).write_bytes(model.SerializeToString(deterministic=True))
    config = folder / "tokenizer_config.json"
    files.write_json(config, files.read_json(config) | {"added_tokens_decoder": added})


def _sets(reader: GGUFReader, name: str) -> bool:
    field = reader.fields.get(f"tokenizer.ggml.{name}")
    return True if field is None else bool(field.contents())
