"""Tiny random models that are no Llama, as folders that base_model would leave, for training, merge and export."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, WORDS, throwaway_tokenizer

TURN = ("<start_of_turn>", "<end_of_turn>")


def gemma3_gguf(path: Path) -> None:
    """A Gemma 3 of six layers, the last of them looking back further than 16 tokens, as llama.cpp writes it."""
    import gguf
    import numpy as np

    pieces = _sentencepieces()
    hidden, layers, heads, inner, width = 256, 6, 2, 256, 64
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weights = random.normal(1 if len(shape) == 1 else 0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weights)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", len(pieces), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        for part in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{layer}.{part}.weight", hidden)
        for part in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{layer}.{part}.weight", width)
        for part, rows in (("attn_q", heads), ("attn_k", 1), ("attn_v", 1)):
            add(f"blk.{layer}.{part}.weight", rows * width, hidden)
        add(f"blk.{layer}.attn_output.weight", hidden, heads * width)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sentencepieces() -> list[tuple[str, float, int]]:
    """(text, score, kind) of each piece of a small vocabulary in the manner of Gemma's."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, f"{WORDS}  {WORDS}", '{"sum": 4} What is 2 + 2?'] * 8),
        model_writer=made,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=["<mask>", *TURN],
        user_defined_symbols=["\n", "\n\n", "\u2581\u2581"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())  # type: ignore[attr-defined]
    user_defined = model.SentencePiece.USER_DEFINED
    return [  # llama.cpp writes the blanks of user-defined pieces as such
        (one.piece.replace("\u2581", " ") if one.type == user_defined else one.piece, one.score, one.type)
        for one in model.pieces
    ]


def gemma3(folder: Path) -> Path:
    from stages.lib import model_folder

    gguf = folder.parent / "gemma.gguf"
    gemma3_gguf(gguf)
    model_folder.from_gguf(gguf, folder)
    model_folder.settle_chat_template(folder, str(ROOT / "conf/prompt/gemma.jinja"))
    model_folder.settle_stops(folder)
    return folder


def qwen3(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _of_classes(folder, Qwen3Config, Qwen3ForCausalLM, tie_word_embeddings=False)


def mistral(folder: Path) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    return _of_classes(folder, MistralConfig, MistralForCausalLM, sliding_window=None)


def _of_classes(folder: Path, config: Any, model: Any, **more: Any) -> Path:
    import torch

    tokenizer = throwaway_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        **more,
    )
    made = model(shape).to(torch.bfloat16)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {"gemma3": gemma3, "qwen3": qwen3, "mistral": mistral}
PRE_TOKENIZER = {"gemma3": "null", "qwen3": "gpt-2", "mistral": "gpt-2"}
