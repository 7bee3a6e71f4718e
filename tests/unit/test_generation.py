"""Reading, scoring and decoding in batches, against the plain model called row by row."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.lib import generation, prefill, scoring

LENGTHS = (3, 11, 7, 1, 18, 7, 2, 9)
STOP = 7


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():  # far from uniform, so that float rounding decides nothing
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Unequal lengths, a common beginning of five tokens."""
    torch.manual_seed(1)
    return [[11, 12, 13, 14, 15, *torch.randint(20, 300, (length,)).tolist()] for length in LENGTHS]


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    torch.manual_seed(2)
    return [torch.randint(20, 300, (length,)).tolist() for length in (1, 4, 9, 2, 3, 1, 6, 5)]


@pytest.fixture(params=[16, 3], autouse=True)
def lines_per_pass(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch read and scored in one pass, and in several."""
    monkeypatch.setattr(prefill, "LINES_PER_PASS", request.param)


@torch.inference_mode()
def plain_continuation(model, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding without cache, padding or batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def plain_nll(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_equal_those_of_the_plain_model_whatever_the_batch(model, prompts, batch_size) -> None:
    found = generation.greedy(model, prompts, stop_ids=[], max_new_tokens=6, batch_size=batch_size)
    assert [row.ids for row in found] == [plain_continuation(model, prompt, 6) for prompt in prompts]
    assert not any(row.stopped for row in found)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihoods_equal_those_of_the_plain_model_whatever_the_batch(model, prompts, answers, batch_size) -> None:
    found = scoring.answer_likelihoods(model, prompts, answers, batch_size=batch_size)
    expected = [plain_nll(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert [row.nll for row in found] == pytest.approx(expected, rel=1e-4)
    assert [row.n_tokens for row in found] == [len(answer) for answer in answers]


def test_prompts_without_a_common_beginning_are_read_alike(model, prompts, answers) -> None:
    others = [[300 + place, *prompt] for place, prompt in enumerate(prompts)]
    assert prefill.common_prefix(others) == 0
    found = generation.greedy(model, others, stop_ids=[], max_new_tokens=4, batch_size=8)
    assert [row.ids for row in found] == [plain_continuation(model, prompt, 4) for prompt in others]
    likelihoods = scoring.answer_likelihoods(model, others, answers, batch_size=8)
    assert likelihoods[4].nll == pytest.approx(plain_nll(model, others[4], answers[4]), rel=1e-4)


def test_a_row_ends_at_its_stop_token_while_others_go_on(model, prompts) -> None:
    plain = [plain_continuation(model, prompt, 8) for prompt in prompts]
    stop = plain[0][2]  # a token some rows write and others do not
    found = generation.greedy(model, prompts, stop_ids=[stop], max_new_tokens=8, batch_size=8)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in plain]
    assert [row.ids for row in found] == expected
    assert [row.stopped for row in found] == [stop in ids for ids in plain]
    assert 0 < sum(row.stopped for row in found) < len(found)


def test_a_stop_token_right_after_the_limit_still_counts_as_stopping(model, prompts) -> None:
    plain = plain_continuation(model, prompts[0], 5)
    limit = plain.index(plain[4])
    found = generation.greedy(model, prompts[:1], stop_ids=[plain[4]], max_new_tokens=limit, batch_size=1)
    assert found == [generation.Generated(plain[:limit], True)]


def test_scoring_leaves_the_read_prompts_ready_to_be_continued(model, prompts, answers) -> None:
    for read in prefill.in_batches(model, prompts, room=12, batch_size=8):
        scoring.after(read, [answers[row] for row in read.rows])
        rows = list(read.rows)
        found = generation.after(read, stop_ids=[], max_new_tokens=6)
        assert [new.ids for new in found] == [plain_continuation(model, prompts[row], 6) for row in rows]


def test_the_common_beginning_leaves_each_row_a_token() -> None:
    assert prefill.common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert prefill.common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert prefill.common_prefix([[1]]) == 0


def test_padding_stands_on_the_left_and_positions_count_tokens_only() -> None:
    ids, mask = prefill.left_padded([[5, 6], [7]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert prefill.positions(mask).tolist() == [[0, 1], [0, 0]]


def test_no_prompts_give_no_answers(model) -> None:
    assert generation.greedy(model, [], stop_ids=[STOP], max_new_tokens=3, batch_size=4) == []
    assert scoring.answer_likelihoods(model, [], [], batch_size=4) == []
