"""The arms of the comparison: which model reads which prompt, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import chat, fewshot, generation, reading, scoring

ARMS = ("base", "fewshot", "tuned")


@dataclass(frozen=True)
class Question:
    """One held-out row as token ids: the prompt, and the reference answer up to and with its end-of-turn token."""

    row: Mapping[str, Any]
    reference: str
    prompt: list[int]
    answer: list[int]

    @property
    def prompt_sha(self) -> str:
        """sha256 of the prompt's token ids, to tell whether two arms or two runs read the same."""
        return hashlib.sha256(",".join(map(str, self.prompt)).encode()).hexdigest()


@dataclass(frozen=True)
class Answered:
    """What a model made of a question: its own answer, and how likely it found the reference."""

    answer: str
    new_tokens: int
    stopped: bool
    likelihood: scoring.Likelihood


def questions(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]] = ()
) -> list[Question]:
    """The last answer of each row is asked for; what stands before it, behind the examples, is the prompt.

    Raises: chat.UnusableConversation, when the template does not let prompt and answer be told apart.
    """
    found = []
    for row in rows:
        *asked, expected = row["messages"]
        conversation = fewshot.conversation(examples, asked)
        prompt = chat.prompt_ids(tokenizer, conversation)
        labels = chat.encode(tokenizer, [*conversation, expected]).labels[len(prompt) :]
        answer = [label for label in labels if label != chat.IGNORED]
        found.append(Question(row, expected["content"], prompt, answer))
    return found


def answer_limit(asked: Sequence[Question], *, margin: int, max_new_tokens: int) -> int:
    """New tokens allowed: the longest reference and a margin. An answer cut there counts as not stopping."""
    return min(max_new_tokens, max(len(question.answer) for question in asked) - 1 + margin)


def weights_of(model: PeftModel, arm: str) -> AbstractContextManager[Any]:
    """Inside this context the model is the one the arm names: the adapter is off for everything but `tuned`."""
    context: AbstractContextManager[Any] = nullcontext() if arm == "tuned" else model.disable_adapter()
    return context


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[Answered]:
    """Let a model score each reference and write its own answer; each prompt is read once for both."""
    found: dict[int, Answered] = {}
    room = max(max_new_tokens, *(len(question.answer) for question in asked))
    prompts = [question.prompt for question in asked]
    for read in reading.in_batches(model, prompts, room=room, batch_size=batch_size):
        likelihoods = scoring.after(read, [asked[row].answer for row in read.rows])
        rows = list(read.rows)
        written = generation.after(read, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        for row, likelihood, new in zip(rows, likelihoods, written, strict=True):
            text = tokenizer.decode(new.ids, skip_special_tokens=True)
            found[row] = Answered(text, len(new.ids), new.stopped, likelihood)
    return [found[row] for row in range(len(asked))]
