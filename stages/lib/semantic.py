"""Semantic near-duplicates: rows that say the same in other words, by the embeddings of a model that the user names."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stages.lib.errors import ModelError
from stages.lib.ngrams import Ints
from stages.lib.schema.dedup import Semantic

if TYPE_CHECKING:
    import torch

Scores = npt.NDArray[np.float64]

MAX_TOKENS = 512  # of a text, from its beginning
BATCH_TOKENS = 8192  # embedded at once, padding included
BLOCK = 4096  # rows by rows of the similarities held at once
DIGITS = 4  # of a similarity: what comes behind depends on the machine, and must not decide


def pairs(texts: Sequence[str], settings: Semantic) -> tuple[Ints, Ints, Scores]:
    """(left, right, score) of every pair whose embeddings' cosine reaches the threshold: left < right, by left, right.

    Args: texts: in the order in which rows are kept. settings: with a model.
    Raises: ModelError, when the folder holds no model that transformers reads.
    """
    found = list(_similar(embeddings(texts, Path(str(settings.model))), settings.threshold))
    left, right, score = (np.concatenate([part[column] for part in found]) for column in range(3))
    order = np.lexsort((right, left))
    return left[order], right[order], score[order]


def embeddings(texts: Sequence[str], folder: Path) -> npt.NDArray[np.float32]:
    """(texts, width): the mean over a text's tokens of the model's last hidden states, of length 1."""
    import torch

    tokenizer, model = _loaded(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    limit = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))
    ids = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    # by length, then text: which texts are padded to one length must not depend on the order of the rows
    order = sorted((row for row in range(len(texts)) if ids[row]), key=lambda row: (len(ids[row]), texts[row]))
    with torch.inference_mode():
        for rows in _batches(order, ids):
            width = len(ids[rows[-1]])
            mask = torch.tensor([[1] * len(ids[row]) + [0] * (width - len(ids[row])) for row in rows], device=device)
            tokens = torch.tensor([ids[row] + [0] * (width - len(ids[row])) for row in rows], device=device)
            states = model(input_ids=tokens, attention_mask=mask).last_hidden_state  # (rows, width, hidden)
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return found


def _loaded(folder: Path) -> tuple[Any, "torch.nn.Module"]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{folder}: no model that transformers reads ({reason}), expected config.json, safetensors and a "
            "tokenizer. Change dedup.semantic.model."
        ) from error
    return tokenizer, model.get_encoder() if model.config.is_encoder_decoder else model


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows in their order, as many at once as are BATCH_TOKENS when padded to the last one's length."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(ids[row]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _similar(embedded: npt.NDArray[np.float32], threshold: float) -> Iterator[tuple[Ints, Ints, Scores]]:
    """(left, right, score) of the pairs found in each block of the matrix of similarities, above its diagonal."""
    yield np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    for top in range(0, len(embedded), BLOCK):
        for begin in range(top, len(embedded), BLOCK):
            scores = np.round(embedded[top : top + BLOCK] @ embedded[begin : begin + BLOCK].T, DIGITS)
            left, right = np.nonzero(scores >= np.float32(threshold))
            above = left + top < right + begin
            left, right = left[above], right[above]
            yield left + top, right + begin, scores[left, right].astype(np.float64).round(DIGITS)
