"""A merged model beside the models it stands for: the probabilities of held-out text, and the answers to test rows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import arms, fidelity, generation, held_out, records
from stages.lib.export import task_score
from stages.lib.schema.evaluate import Evaluate


@dataclass(frozen=True)
class Asked:
    """What each model is asked: held-out conversations as token ids, and test rows, whose answers it writes.

    limits: new tokens by task, as in evaluate.
    """

    tokenizer: PreTrainedTokenizerFast
    stop_ids: Collection[int]
    rows: Sequence[Sequence[int]]
    questions: Sequence[arms.Question]
    limits: Mapping[str, int]
    settings: Evaluate


@dataclass(frozen=True)
class Seen:
    """What a model made of it. answers: by row id."""

    probabilities: fidelity.Reference
    answers: Mapping[str, str]


def ask(
    splits: Path,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: Collection[int],
    settings: Evaluate,
    *,
    rows: int,
    answers: int,
) -> Asked:
    """Args: rows: held-out conversations. answers: test rows, every task represented."""
    test, _ = held_out.usable(tokenizer, records.read(splits / "test.parquet"))
    limits = {
        task: arms.answer_limit(
            arms.questions(tokenizer, found), margin=settings.answer_margin, max_new_tokens=settings.max_new_tokens
        )
        for task, found in arms.by_task(test).items()
    }
    return Asked(
        tokenizer,
        stop_ids,
        held_out.conversations(splits, tokenizer, rows),
        arms.questions(tokenizer, held_out.spread(test, answers)),
        limits,
        settings,
    )


def see(asked: Asked, model: PreTrainedModel, answered: Mapping[str, str] | None = None) -> Seen:
    """Let a model read the conversations, and answer the test rows in one batch.

    Args: answered: answers it gave before, by row id.
    """
    answers = dict(answered or {})
    open_ones = [question for question in asked.questions if question.row["id"] not in answers]
    written = generation.greedy(
        model,
        [question.prompt for question in open_ones],
        stop_ids=asked.stop_ids,
        max_new_tokens=max(asked.limits.values(), default=1),
        batch_size=max(1, len(open_ones)),
    )
    for question, one in zip(open_ones, written, strict=True):
        kept = one.ids[: asked.limits[question.row["task"]]]
        answers[question.row["id"]] = asked.tokenizer.decode(kept, skip_special_tokens=True)
    return Seen(fidelity.reference(fidelity.of(model), asked.rows), answers)


def closeness(expected: Seen, found: Seen) -> fidelity.Fidelity:
    """How near the probabilities are."""
    log_probs = iter(found.probabilities.log_probs)
    return fidelity.compare(expected.probabilities, lambda row, start: next(log_probs))


def task_metrics(asked: Asked, expected: Seen, found: Seen) -> dict[str, float]:
    """`task/<task>/<measure>/{delta,low,high}`: the answers' score minus that of the expected, with its interval."""
    rows = [
        {
            "id": question.row["id"],
            "task": question.row["task"],
            "reference": question.reference,
            "label": question.row["label"],
            "answer": expected.answers[question.row["id"]],
        }
        for question in asked.questions
    ]
    e = asked.settings
    scores = task_score.differences(
        found.answers, rows, samples=e.bootstrap_samples, confidence=e.confidence, seed=e.seed
    )
    return {
        f"task/{name}/{part}": getattr(one, part) for name, one in scores.items() for part in ("delta", "low", "high")
    }
