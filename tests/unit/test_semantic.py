"""Semantic near-duplicates: embeddings that point the same way."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.lib import semantic
from stages.lib.errors import ModelError
from stages.lib.schema.dedup import Semantic

TEXTS = ["the quick brown fox", "1 2 3 4 5 6 7 8 9", "the quick brown fox", "a lazy dog jumps over nothing at all", ""]


def test_texts_whose_embeddings_reach_the_threshold_are_pairs(tiny_model_dir: Path) -> None:
    left, right, score = semantic.pairs(TEXTS, Semantic(str(tiny_model_dir), 0.9999))
    assert (left.tolist(), right.tolist(), score.tolist()) == ([0], [2], [1.0])
    vectors = semantic.embeddings(TEXTS, tiny_model_dir)
    above = [(row, other) for other in range(5) for row in range(other) if vectors[row] @ vectors[other] >= 0.3]
    left, right, _ = semantic.pairs(TEXTS, Semantic(str(tiny_model_dir), 0.3))
    assert list(zip(left, right, strict=True)) == sorted(above)


def test_an_embedding_is_the_mean_of_the_last_hidden_states_without_the_padding(tiny_model_dir: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModel.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(**tokenizer(TEXTS[3], return_tensors="pt")).last_hidden_state[0].mean(0)
    together = semantic.embeddings(TEXTS, tiny_model_dir)
    assert np.allclose(together[3], states / states.norm(), atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), [1, 1, 1, 1, 0], atol=1e-5)


def test_pairs_do_not_depend_on_blocks_and_batches(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Semantic(str(tiny_model_dir), 0.5)
    whole = semantic.pairs(TEXTS, settings)
    monkeypatch.setattr(semantic, "BLOCK", 2)
    monkeypatch.setattr(semantic, "BATCH_TOKENS", 1)
    pieces = semantic.pairs(TEXTS, settings)
    assert [column.tolist() for column in whole[:2]] == [column.tolist() for column in pieces[:2]]
    assert np.allclose(whole[2], pieces[2], atol=2e-4)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model that transformers reads.*dedup\.semantic\.model"):
        semantic.pairs(TEXTS, Semantic(str(tmp_path), 0.9))


def test_torch_is_imported_only_when_embeddings_are_asked_for() -> None:
    code = "import sys; from stages.lib import semantic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
