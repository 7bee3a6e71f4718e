"""The loss of packs: torch's cross entropy where there are labels, in the memory of the logits alone."""

import pytest
import torch

from stages.lib import loss


@pytest.mark.parametrize("magnitude", [1.0, 200.0])
def test_the_loss_and_its_gradient_are_torchs(magnitude: float) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 16), torch.randn(16, 50) * magnitude
    labels = torch.randint(0, 50, (7,))
    found = []
    for cross_entropy in (loss.cross_entropy, lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="sum")):
        given = hidden.clone().requires_grad_()
        nll = cross_entropy(given @ head, labels)
        (nll / 3).backward()
        found.append((nll.detach(), given.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_logits_that_something_else_needs_are_not_spent_in_silence() -> None:
    logits = (torch.randn(3, 5).requires_grad_() * 2).tanh()  # tanh keeps its result for its gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()


def test_no_labels_cost_nothing() -> None:
    assert loss.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).item() == 0


def test_packs_are_laid_end_to_end() -> None:
    one = {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]}
    batch = loss.end_to_end([one, {"input_ids": [7], "labels": [-100], "position_ids": [0]}])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7]],
        "labels": [[-100, 6, -100]],
        "position_ids": [[0, 1, 0]],
    }
