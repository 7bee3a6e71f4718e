"""The most likely label: a trie read in a few passes gives the figures of labels scored one by one."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from stages.lib import classification, kernels, scoring
from stages.lib.classification import Trie, label_likelihoods, labels_of

END = 2
ANSWERS = {
    "a": [10, END],  # begins the next three
    "a b": [10, 11, END],
    "a b c": [10, 11, 12, END],
    "a b d e": [10, 11, 13, 14, END],
    "f": [20, 21, 22, 23, 24, 25, END],
    "nothing": [END],
}
SHARED = list(range(100, 108))
PROMPTS = [[*SHARED, *tail] for tail in ([30, 31, 32, 33], [40], [50, 51, 52, 53, 54, 55, 56], [60, 61], [70, 71, 72])]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    """The tiny model with an adapter that matters."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():  # far from uniform, so that some labels are much likelier than others
        for parameter in base.parameters():
            parameter.mul_(3)
    return tuned.eval()


def one_by_one(model: Any) -> np.ndarray:
    """Every label of every prompt, each scored as an answer of its own."""
    columns = [
        scoring.answer_likelihoods(model, PROMPTS, [answer] * len(PROMPTS), batch_size=8) for answer in ANSWERS.values()
    ]
    return np.array([[each.nll for each in column] for column in columns]).T


@pytest.fixture(scope="module")
def expected(model: Any) -> np.ndarray:
    return one_by_one(model)


@pytest.mark.parametrize(("with_adapter", "attention"), [(True, kernels.DOCUMENTS), (False, "sdpa")])
def test_every_label_is_as_likely_as_when_it_is_scored_alone(model: Any, with_adapter: bool, attention: str) -> None:
    model.base_model.model.set_attn_implementation(attention)
    with nullcontext() if with_adapter else model.disable_adapter():
        found, expected = label_likelihoods(model, PROMPTS, ANSWERS, batch_size=3), one_by_one(model)
    assert found.shape == (5, 6)
    assert np.abs(found - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).min() > 0.01  # the prompts matter


@pytest.mark.parametrize(("batch_size", "tokens_per_pass"), [(1, 256), (3, 5), (8, 1)])
def test_where_references_are_known_the_best_label_and_theirs_are_exact_and_no_other_is_better(
    model: Any, expected: np.ndarray, batch_size: int, tokens_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "TOKENS_PER_PASS", tokens_per_pass)
    references = list(ANSWERS)[1:]  # another of each row
    found = label_likelihoods(model, PROMPTS, ANSWERS, batch_size=batch_size, references=references)
    assert found.argmin(axis=1).tolist() == expected.argmin(axis=1).tolist()
    for figures, exact in ((found.min(axis=1), expected.min(axis=1)), (found.diagonal(1), expected.diagonal(1))):
        assert np.abs(figures - exact).max() < 1e-4
    assert np.abs(found - expected)[np.isfinite(found)].max() < 1e-4


@torch.inference_mode()
def test_a_beginning_worse_than_a_whole_label_is_not_read_on(model: Any) -> None:
    order = model(torch.tensor(PROMPTS[:1])).logits[0, -1].argsort(descending=True).tolist()
    answers = {"likely": order[:1], "not likely": [order[-1], *range(40, 60)]}
    found = label_likelihoods(model, PROMPTS[:1], answers, batch_size=8, references=["likely"])
    assert np.isfinite(found).tolist() == [[True, False]]
    assert np.isfinite(label_likelihoods(model, PROMPTS[:1], answers, batch_size=8)).all()


@torch.inference_mode()
def test_a_label_a_little_better_than_the_right_one_is_found(model: Any) -> None:
    prompt = PROMPTS[0]
    order = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
    answers = {}
    for name, token in (("right", order[2]), ("close", order[1]), ("best", order[0])):  # all that counts comes first
        logits = model(torch.tensor([[*prompt, token]])).logits[0, -1]
        answers[name] = [token, int(logits.argmax())]
    exact = label_likelihoods(model, [prompt], answers, batch_size=8)
    found = label_likelihoods(model, [prompt], answers, batch_size=8, references=["right"])
    assert np.ptp(exact) < 3
    assert found.argmin() == exact.argmin() != 0
    assert found.min() == pytest.approx(exact.min(), abs=1e-4)


def test_long_labels_are_read_to_the_end_when_reserved_columns_run_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "TOKENS_PER_PASS", len(PROMPTS))  # one node a line and pass
    answers = {str(n): [20 + n, *range(40, 40 + 3 * n), END] for n in range(6)}
    found = label_likelihoods(model, PROMPTS, answers, batch_size=8, references=["5"] * 5)
    expected = label_likelihoods(model, PROMPTS, answers, batch_size=8)
    assert found.argmin(axis=1).tolist() == expected.argmin(axis=1).tolist()


def test_labels_behind_a_prompt_longer_than_a_layer_looks_back_are_scored_one_by_one(model: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 325, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8, head_dim=64)
    near = MistralForCausalLM(config).eval()
    assert np.abs(label_likelihoods(near, PROMPTS, ANSWERS, batch_size=8) - one_by_one(near)).max() < 1e-4


def test_a_trie_holds_each_beginning_once_and_parents_before_children() -> None:
    trie = Trie.of(list(ANSWERS.values()))
    assert trie.tokens.tolist()[1:] == [10, 20, 11, 21, 12, 13, 22, 14, 23, 24, 25]
    assert trie.depths.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6]
    assert (trie.parents < np.arange(len(trie))).all()
    assert trie.paths[list(ANSWERS).index("a b d e")] == [1, 3, 6, 8]


def test_rows_are_a_classification_when_each_has_one_of_few_labels() -> None:
    rows = [{"kind": "chat", "label": label} for label in ("no", "yes", "no")]
    assert labels_of(rows) == ["no", "yes"]
    assert labels_of([*rows, {"kind": "chat", "label": None}]) is None
    assert labels_of([{"kind": "unpaired", "label": "true"}]) is None  # the mark of a wanted answer is no class
    assert labels_of([{"kind": "chat", "label": str(n)} for n in range(501)]) is None
    assert labels_of([]) is None
