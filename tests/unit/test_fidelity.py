"""fidelity: divergences and agreement by hand, and a damaged model seen."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.lib import fidelity, models
from tests.exported import NUMERICS

ROWS = [[1, 20, 30, 40, 50, 60], [1, 20, 31, 41]]


class Fixed:
    """A model of three tokens that expects the same at every place."""

    device = "cpu"

    def __init__(self, *probabilities: float) -> None:
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(1, logits_to_keep, -1))


def test_the_divergence_of_two_known_distributions() -> None:
    expected = fidelity.reference(fidelity.of(Fixed(0.5, 0.25, 0.25)), [[0, 0, 1], [0, 2, 0, 0]])
    close = fidelity.compare(expected, fidelity.of(Fixed(0.25, 0.5, 0.25)))
    assert close.tokens == 5
    assert close.kl_mean == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert close.top1 == 0
    # three tokens 0, one token 1, one token 2
    assert close.perplexity == pytest.approx(math.exp((3 * math.log(4) + math.log(2) + math.log(4)) / 5))
    assert close.reference_perplexity == pytest.approx(math.exp((3 * math.log(2) + 2 * math.log(4)) / 5))


def test_a_model_is_equal_to_itself(tiny_model_dir: Path) -> None:
    model = fidelity.of(models.load_dense(tiny_model_dir, NUMERICS))
    close = fidelity.compare(fidelity.reference(model, ROWS), model)
    assert (close.kl_mean, close.top1, close.perplexity_ratio) == (0, 1, 1)


def test_what_all_rows_begin_with_is_left_out(tiny_model_dir: Path) -> None:
    expected = fidelity.reference(fidelity.of(models.load_dense(tiny_model_dir, NUMERICS)), ROWS)
    assert expected.skipped == 2
    assert [len(row) for row in expected.log_probs] == [4, 2]


def test_a_layer_of_zeros_is_seen(tiny_model_dir: Path) -> None:
    model = models.load_dense(tiny_model_dir, NUMERICS)
    expected = fidelity.reference(fidelity.of(model), ROWS)
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
    assert fidelity.compare(expected, fidelity.of(model)).kl_mean > 1e-4


def test_gaps_are_over_the_likely_candidates_of_every_token() -> None:
    found = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    assert fidelity.gaps(found, [{0: -1.25, 1: -2.0}, {1: -3.5, 0: -9.0}]) == pytest.approx([0.25, 0.0, 0.5])


def test_the_reference_is_no_distance_from_itself_and_has_its_own_perplexity() -> None:
    expected = fidelity.Reference([[0, 1]], 1, [torch.tensor([[0.25, 0.75]]).log()])
    found = fidelity.itself(expected)
    assert (found.kl_mean, found.top1, found.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert found.perplexity == pytest.approx(1 / 0.75)


def test_a_model_that_reads_rows_behind_longer_texts_is_asked_for_the_same_tokens(tiny_model_dir: Path) -> None:
    model = models.load_dense(tiny_model_dir, NUMERICS)
    rows = [[5, 6, 7, 8], [5, 6, 10]]
    asked = fidelity.behind(model, [[9, 9, 9, *row] for row in rows])  # both behind the same, which is read once
    for row in rows:
        found = asked(row, 2)
        torch.testing.assert_close(found, fidelity.log_probs(model, [9, 9, 9, *row], 5), atol=1e-5, rtol=0)
        assert found.shape == fidelity.log_probs(model, row, 2).shape
