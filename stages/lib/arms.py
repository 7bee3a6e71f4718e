"""The arms of the comparison: which model reads which prompt, and what it answers."""

from __future__ import annotations

import hashlib
import heapq
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import (
    chat,
    classification,
    fewshot,
    generation,
    languages,
    models,
    numerics,
    others,
    prefill,
    records,
    scoring,
    untrained,
)
from stages.lib.measures import SCORES, applicable, library
from stages.lib.schema.evaluate import ARMS, Classify, Evaluate
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.pack import Labels
from stages.lib.schema.split import task_in_train

__all__ = ["ARMS", "Arm", "Predicted", "answer", "answer_limit", "describe", "losses", "predict", "questions"]

Row = Mapping[str, Any]
LENGTHS = ("short", "middle", "long")


@dataclass(frozen=True)
class Question:
    """One held-out row as token ids: the prompt, and the reference answer up to and with its end-of-turn token."""

    row: Row
    reference: str
    prompt: list[int]
    answer: list[int]
    n_bytes: int  # of the reference, UTF-8

    @property
    def prompt_sha(self) -> str:
        """sha256 of the prompt's token ids, to tell whether two arms or two runs read the same."""
        return hashlib.sha256(",".join(map(str, self.prompt)).encode()).hexdigest()


@dataclass(frozen=True)
class Answered:
    """What a model made of a question: its own answer, and how likely it found the reference."""

    answer: str
    likelihood: scoring.Likelihood
    new_tokens: int | None  # None, as stopped: the answer was chosen among labels
    stopped: bool | None


@dataclass(frozen=True)
class Arm:
    """One of those that are compared: a model, its own tokenizer and stop ids, and examples by task, if it sees any."""

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    stop_ids: Collection[int]
    examples: Mapping[str, Sequence[Row]] | None = None
    adapter_off: bool = False

    def weights(self) -> AbstractContextManager[Any]:
        """Inside this context the model is the one the arm means."""
        context: AbstractContextManager[Any] = self.model.disable_adapter() if self.adapter_off else nullcontext()
        return context


def load(name: str, folder: Path, base: Path, n: Numerics) -> Arm:
    """The arm of evaluate.others: an adapter on the base, or a model with its own tokenizer and chat template."""
    if others.is_adapter(folder):
        tokenizer, source = chat.load_tokenizer(base), base
        model = models.load_tuned(base, folder, n, dense=numerics.resolve(n).device == "cpu")
    else:
        tokenizer, source = chat.load_tokenizer(folder), folder
        model = models.load_dense(folder, n)
    return Arm(name, model, tokenizer, chat.stop_ids(tokenizer, source))


@dataclass
class Speed:
    """How fast an arm wrote: tokens and seconds after the prompts were read, and reading one prompt by itself."""

    tokens: int = 0
    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)


@dataclass
class Predicted:
    """What the arms made of the test rows.

    predictions: rows of comparison.PREDICTIONS. limits: new tokens allowed, by task. seconds: wall time by task and
    arm, `<task>/<arm>`.
    """

    predictions: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)

    def add(self, other: Predicted) -> None:
        """Take in what another arm made of the same rows; of limits the first say counts."""
        self.predictions += other.predictions
        self.limits = other.limits | self.limits
        self.seconds |= other.seconds
        self.speeds |= other.speeds

    def sort(self) -> None:
        self.predictions.sort(key=lambda row: (row["arm"], row["id"]))

    def measured(self) -> dict[str, float]:
        """Times and speeds of this very run, by `evaluate/<arm>/<what>`."""
        found = {f"evaluate/{name}/wall_s": seconds for name, seconds in self.seconds.items()}
        for arm, speed in self.speeds.items():
            if speed.tokens:
                found[f"evaluate/{arm}/tokens_per_second"] = round(speed.tokens / speed.seconds, 1)
            if speed.first_token:
                found[f"evaluate/{arm}/first_token_s"] = round(statistics.median(speed.first_token), 4)
        return found


@dataclass(frozen=True)
class Described:
    """What a row is, whichever arm answers it; see comparison.PREDICTIONS."""

    length: str
    language: str | None
    labels: Sequence[str]  # that its task's answers are among; none, when that is no classification


def describe(tokenizer: PreTrainedTokenizerFast, test: Sequence[Row], train: Path) -> dict[str, Described]:
    """Length and language of each row's prompt without examples, and the labels of its task, by row id.

    Labels are those of train and test together: a small test split may lack some.
    """
    known = pq.read_table(train, columns=["task", "label"]).group_by(["task", "label"]).aggregate([]).to_pylist()
    found = {}
    for task, rows in by_task(test).items():
        asked = questions(tokenizer, rows)
        trained = [{**row, "kind": "chat"} for row in known if row["task"] == task_in_train(task)]
        labels = classification.labels_of([*rows, *trained]) or ()
        if any(question.reference != question.row["label"] for question in asked):
            labels = ()
        lengths = thirds([len(question.prompt) for question in asked])
        for row, length in zip(rows, lengths, strict=True):
            turns = records.conversation(row)
            users = [turn.get("content") or "" for turn in turns or () if turn["role"] == "user"]
            text = row["text"] if turns is None else "\n".join(users)
            found[row["id"]] = Described(length, languages.language(text), labels)
    return found


def thirds(lengths: Sequence[int]) -> list[str]:
    """Which third of all each is in; equal ones are in the same.

    [5, 9, 7, 5, 8, 30]  ->  short, long, middle, short, middle, long
    """
    ordered = sorted(lengths)
    first, second = (ordered[max(0, -(-len(ordered) * part // 3) - 1)] for part in (1, 2))
    return [LENGTHS[(length > first) + (length > second)] for length in lengths]


def predict(arm: Arm, test: Sequence[Row], described: Mapping[str, Described], p: Evaluate) -> Predicted:
    """Let an arm answer the test rows, task by task."""
    found, speed = Predicted(), Speed()
    found.speeds[arm.name] = speed
    for task, rows in by_task(test).items():
        started = time.monotonic()
        every = questions(arm.tokenizer, rows, arm.examples[task] if arm.examples else ())
        limit = answer_limit(every, margin=p.answer_margin, max_new_tokens=p.max_new_tokens)
        chosen = drawn(rows, p.max_rows[arm.name], p.seed) if arm.name in p.max_rows else rows
        ids = {row["id"] for row in chosen}
        asked = [question for question in every if question.row["id"] in ids]
        labels = described[rows[0]["id"]].labels if p.classify is Classify.likelihood else ()
        with arm.weights():
            answered = (
                choose(arm, asked, labels, batch_size=p.batch_size)
                if labels
                else answer(
                    arm.model,
                    arm.tokenizer,
                    asked,
                    stop_ids=arm.stop_ids,
                    max_new_tokens=limit,
                    batch_size=p.batch_size,
                    speed=speed,
                )
            )
        found.limits[task] = limit
        found.predictions += _scored(arm.name, asked, answered, described)
        found.seconds[f"{task}/{arm.name}"] = time.monotonic() - started
        print(f"{task}, {arm.name}: {len(asked)} rows in {found.seconds[f'{task}/{arm.name}']:.0f} s", flush=True)
    return found


def predict_once(
    store: Path | None, arm: Arm, test: Sequence[Row], described: Mapping[str, Described], p: Evaluate
) -> Predicted:
    """The same of an arm that no training changes, see `untrained.once`; its times are those of this very run."""
    found = Predicted()

    def make() -> dict[str, Any]:
        found.add(predict(arm, test, described, p))
        return {"predictions": found.predictions, "limits": found.limits}

    kept = untrained.once(store, arm.name, make)
    return Predicted(kept["predictions"], kept["limits"], found.seconds, found.speeds)


def drawn(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """At most so many rows, by a hash of seed and id: a larger number only adds."""
    return heapq.nsmallest(most, rows, key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each task, tasks and rows in the order of their names and ids."""
    tasks = sorted({row["task"] for row in rows})
    return {
        task: sorted((row for row in rows if row["task"] == task), key=lambda row: str(row["id"])) for task in tasks
    }


def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, test: Sequence[Row], p: Evaluate
) -> dict[str, float]:
    """Loss per token of the references without examples, by task, for a model that is no arm of its own."""
    found = {}
    for task, rows in by_task(test).items():
        asked = questions(tokenizer, rows)
        likelihoods = scoring.answer_likelihoods(
            model, [each.prompt for each in asked], [each.answer for each in asked], batch_size=p.batch_size
        )
        found[task] = sum(each.nll for each in likelihoods) / sum(each.n_tokens for each in likelihoods)
    return found


def _scored(
    arm: str, asked: Sequence[Question], answered: Sequence[Answered], described: Mapping[str, Described]
) -> list[dict[str, Any]]:
    """Rows of comparison.PREDICTIONS for one task and arm."""
    references = [question.reference for question in asked]
    of_labels = bool(described[asked[0].row["id"]].labels)
    names = applicable(references, of_labels=of_labels)
    scores = library.score_rows(
        names, [given.answer.strip() if of_labels else given.answer for given in answered], references
    )
    return [
        {
            "arm": arm,
            "id": question.row["id"],
            "task": question.row["task"],
            "source": question.row["source"],
            "language": described[question.row["id"]].language,
            "length": described[question.row["id"]].length,
            "prompt_sha": question.prompt_sha,
            "answer": given.answer,
            "reference": question.reference,
            "n_tokens": given.likelihood.n_tokens,
            "n_bytes": question.n_bytes,
            "nll": given.likelihood.nll,
            "new_tokens": given.new_tokens,
            "stops": None if given.stopped is None else float(given.stopped),
            "label": question.reference if of_labels else None,
            "predicted": given.answer.strip() if of_labels else None,
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
        rest_bytes = len(tokenizer.decode(rest).encode())
        return Question(row, row["text"], [*map(int, shown), first], rest, rest_bytes)
    *asked, expected = turns
    conversation = fewshot.conversation(examples, asked)
    prompt = chat.prompt_ids(tokenizer, conversation, row["tools"])
    labels = chat.encode(tokenizer, [*conversation, expected], row["tools"], labels=Labels.last_turn).labels
    answer = [int(label) for label in labels if label != chat.IGNORED]
    calls = "tool_calls" in expected
    reference = tokenizer.decode(answer, skip_special_tokens=True) if calls else expected["content"]
    return Question(row, reference, prompt, answer, len(reference.encode()))


def answer_limit(asked: Sequence[Question], *, margin: int, max_new_tokens: int) -> int:
    """New tokens allowed: the longest reference and a margin. An answer cut there counts as not stopping."""
    return min(max_new_tokens, max(len(question.answer) for question in asked) - 1 + margin)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Question],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
    speed: Speed,
) -> list[Answered]:
    """Let a model score each reference and write its own answer; each prompt is read once for both."""
    found: dict[int, Answered] = {}
    room = max(max_new_tokens, *(len(question.answer) for question in asked))
    prompts = [question.prompt for question in asked]
    for read in prefill.in_batches(model, prompts, room=room, batch_size=batch_size):
        likelihoods = scoring.after(read, [asked[row].answer for row in read.rows])
        rows = list(read.rows)
        started = time.monotonic()
        written = generation.after(read, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        speed.seconds += time.monotonic() - started
        speed.tokens += sum(len(new.ids) + new.stopped for new in written)
        for row, likelihood, new in zip(rows, likelihoods, written, strict=True):
            text = tokenizer.decode(new.ids, skip_special_tokens=True)
            found[row] = Answered(text, likelihood, len(new.ids), new.stopped)
    started = time.monotonic()
    for _ in prefill.in_batches(model, [sorted(prompts, key=len)[len(prompts) // 2]], room=1, batch_size=1):
        speed.first_token.append(time.monotonic() - started)
    return [found[row] for row in range(len(asked))]


def choose(arm: Arm, asked: Sequence[Question], labels: Sequence[str], *, batch_size: int) -> list[Answered]:
    """Let a model answer with the label it finds the most likely."""
    turns = records.conversation(asked[0].row) or []
    answers = classification.label_answers(arm.tokenizer, turns[:-1], labels, asked[0].row["tools"])
    nll = classification.label_likelihoods(
        arm.model,
        [question.prompt for question in asked],
        answers,
        batch_size=batch_size,
        references=[question.reference for question in asked],
    )
    return [
        Answered(
            labels[int(found.argmin())],
            scoring.Likelihood(float(found[labels.index(question.reference)]), len(question.answer)),
            new_tokens=None,
            stopped=None,
        )
        for question, found in zip(asked, nll, strict=True)
    ]
