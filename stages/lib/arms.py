"""The arms of the comparison: which model reads which prompt, and what it answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import chat, fewshot, generation, prefill, records, scoring
from stages.lib.measures import SCORES, applicable, library
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.pack import Labels

Row = Mapping[str, Any]
ARMS = ("base", "fewshot", "tuned")


@dataclass(frozen=True)
class Question:
    """One held-out row as token ids: the prompt, and the reference answer up to and with its end-of-turn token."""

    row: Row
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


@dataclass
class Predicted:
    """What the arms made of the test rows.

    predictions: rows of comparison.PREDICTIONS, sorted by arm and id. limits: new tokens allowed, by task.
    seconds: wall time by task and arm, `<task>/<arm>`.
    """

    predictions: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def predict(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    test: Sequence[Row],
    examples: Mapping[str, Sequence[Row]],
    p: Evaluate,
    *,
    stop_ids: Collection[int],
) -> Predicted:
    """Let every arm answer every test row, task by task; only the few-shot arm sees examples, rows of train by task."""
    found = Predicted()
    for task, rows in by_task(test).items():
        for arm in ARMS:
            started = time.monotonic()
            asked = questions(tokenizer, rows, examples[task] if arm == "fewshot" else ())
            found.limits[task] = answer_limit(asked, margin=p.answer_margin, max_new_tokens=p.max_new_tokens)
            with weights_of(model, arm):
                answered = answer(
                    model,
                    tokenizer,
                    asked,
                    stop_ids=stop_ids,
                    max_new_tokens=found.limits[task],
                    batch_size=p.batch_size,
                )
            found.predictions += _scored(arm, asked, answered)
            found.seconds[f"{task}/{arm}"] = time.monotonic() - started
            print(f"{task}, {arm}: {len(asked)} rows in {found.seconds[f'{task}/{arm}']:.0f} s", flush=True)
    found.predictions.sort(key=lambda row: (row["arm"], row["id"]))
    return found


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each task, tasks and rows in the order of their names and ids."""
    tasks = sorted({row["task"] for row in rows})
    return {
        task: sorted((row for row in rows if row["task"] == task), key=lambda row: str(row["id"])) for task in tasks
    }


def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, test: Sequence[Row], *, batch_size: int
) -> dict[str, float]:
    """Loss per token of the references without examples, by task, for a model that is no arm of its own."""
    found = {}
    for task, rows in by_task(test).items():
        asked = questions(tokenizer, rows)
        likelihoods = scoring.answer_likelihoods(
            model, [each.prompt for each in asked], [each.answer for each in asked], batch_size=batch_size
        )
        found[task] = sum(each.nll for each in likelihoods) / sum(each.n_tokens for each in likelihoods)
    return found


def _scored(arm: str, asked: Sequence[Question], answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """Rows of comparison.PREDICTIONS for one task and arm."""
    references = [question.reference for question in asked]
    scores = library.score_rows(applicable(references), [given.answer for given in answered], references)
    return [
        {
            "arm": arm,
            "id": question.row["id"],
            "task": question.row["task"],
            "slice": question.row["source"],
            "prompt_sha": question.prompt_sha,
            "answer": given.answer,
            "reference": question.reference,
            "n_tokens": given.likelihood.n_tokens,
            "nll": given.likelihood.nll,
            "new_tokens": given.new_tokens,
            "stops": float(given.stopped),
            **{name: scores[name][place] if name in scores else None for name in SCORES},
        }
        for place, (question, given) in enumerate(zip(asked, answered, strict=True))
    ]


def questions(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], examples: Sequence[Row] = ()) -> list[Question]:
    """The last answer of each row is asked for; what stands before it, behind the examples, is the prompt.

    Of a plain text, which answers nothing, the first token is the prompt and the rest the answer.

    Raises: chat.UnusableConversation, when the template does not let prompt and answer be told apart.
    """
    return [_question(tokenizer, row, examples) for row in rows]


def _question(tokenizer: PreTrainedTokenizerFast, row: Row, examples: Sequence[Row]) -> Question:
    turns = records.conversation(row)
    if turns is None:
        shown = [token for example in examples for token in chat.encode_text(tokenizer, example["text"]).input_ids]
        first, *rest = (int(token) for token in chat.encode_text(tokenizer, row["text"]).input_ids)
        return Question(row, row["text"], [*map(int, shown), first], rest)
    *asked, expected = turns
    conversation = fewshot.conversation(examples, asked)
    prompt = chat.prompt_ids(tokenizer, conversation, row["tools"])
    labels = chat.encode(tokenizer, [*conversation, expected], row["tools"], labels=Labels.last_turn).labels
    answer = [int(label) for label in labels if label != chat.IGNORED]
    calls = "tool_calls" in expected
    reference = tokenizer.decode(answer, skip_special_tokens=True) if calls else expected["content"]
    return Question(row, reference, prompt, answer)


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
    for read in prefill.in_batches(model, prompts, room=room, batch_size=batch_size):
        likelihoods = scoring.after(read, [asked[row].answer for row in read.rows])
        rows = list(read.rows)
        written = generation.after(read, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        for row, likelihood, new in zip(rows, likelihoods, written, strict=True):
            text = tokenizer.decode(new.ids, skip_special_tokens=True)
            found[row] = Answered(text, len(new.ids), new.stopped, likelihood)
    return [found[row] for row in range(len(asked))]
