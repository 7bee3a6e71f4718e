"""Load every written format again and measure what it costs; one model in memory at a time."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import arms, chat, fidelity, held_out, models
from stages.lib.errors import GateError
from stages.lib.export import task_score
from stages.lib.export.formats.exporter import Request, Session, Trained
from stages.lib.export.writing import Written
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.export import Export
from stages.lib.schema.numerics import Numerics

THREE_TURNS = (
    {"role": "user", "content": "What is 2 + 2?  Answer in one word."},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": 'And as JSON, {"sum": 4}?\n\nÜmläute, 漢字 and `code` too.'},
)
Predictions = Mapping[str, Mapping[str, Any]]
"""Rows of predictions.parquet, arm `tuned`, by row id."""


@dataclass
class Found:
    """metrics: flat. table: rows of plots/formats.csv. speeds: of this run only, no output holds them."""

    metrics: dict[str, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def by_format(self) -> dict[str, dict[str, Any]]:
        return {row["format"]: {key: value for key, value in row.items() if key != "format"} for row in self.table}


@dataclass(frozen=True)
class Asked:
    """The test rows a format answered in its runtime, in the order of its answers."""

    questions: Sequence[arms.Question]
    limits: Mapping[str, int]  # new tokens by task, as in evaluate
    session: Session

    def answered(self) -> list[tuple[str, list[int], bool]]:
        """(row id, token ids, ended by itself) of each answer, cut where evaluate would have cut it."""
        cut = []
        for question, answer in zip(self.questions, self.session.answers, strict=True):
            limit = self.limits[question.row["task"]]
            cut.append((question.row["id"], answer.ids[:limit], answer.stopped and len(answer.ids) <= limit))
        return cut


def ask(
    written: Sequence[Written], trained: Trained, test: Sequence[Mapping[str, Any]], p: Export, e: Evaluate
) -> dict[str, Asked]:
    """Let each format answer test rows in its own runtime, every task represented.

    Raises: GateError, when one writes a chat otherwise than training did; ExternalError, when a runtime crashes.
    """
    tokenizer = chat.load_tokenizer(trained.merged)
    stop_ids = chat.stop_ids(tokenizer, trained.merged)
    every = arms.questions(tokenizer, test)
    limits = {
        task: arms.answer_limit(
            [question for question in every if question.row["task"] == task],
            margin=e.answer_margin,
            max_new_tokens=e.max_new_tokens,
        )
        for task in {question.row["task"] for question in every}
    }
    questions = {question.row["id"]: question for question in every}
    found = {}
    for one in written:
        count = p.answers[one.form] if one.form in p.answers else p.probes
        asked = [questions[row["id"]] for row in held_out.spread(test, max(count, p.probes))]
        request = Request(
            chats=[THREE_TURNS],
            prompts=[question.prompt for question in asked],
            stop_ids=stop_ids,
            max_new_tokens=max(limits[question.row["task"]] for question in asked) + 1,
        )
        session = one.exporter.ask(one.path, request, trained)
        check_chat(one.path, session, tokenizer)
        found[str(one.form)] = Asked(asked, limits, session)
    return found


def measure(
    written: Sequence[Written],
    asked: Mapping[str, Asked],
    trained: Trained,
    rows: Sequence[Sequence[int]],
    predicted: Predictions,
    *,
    p: Export,
    e: Evaluate,
    n: Numerics,
) -> Found:
    """Measure every format against the merged model.

    Args: rows: held-out conversations as token ids.
    Raises: GateError, when a format is further from the merged model than export.max_kl allows, or does not stop.
    """
    found = Found()
    reference_model = models.load_dense(trained.merged, n)
    weights = sum(weight.numel() for weight in reference_model.parameters())
    expected = fidelity.reference(fidelity.of(reference_model), rows)
    for form, told in asked.items():
        found.metrics |= _in_runtime(form, told, reference_model, predicted, p, e, trained.merged)
        tokens = sum(len(answer.ids) for answer in told.session.answers)
        found.speeds[f"export/{form}/tokens_per_second"] = round(tokens / told.session.seconds, 2)
    del reference_model
    gc.collect()

    faults = []
    for one in written:
        size = asdict(one.exporter.size(one.path, weights))
        close = fidelity.compare(expected, one.exporter.log_probs(one.path, trained))
        gc.collect()
        found.metrics |= close.metrics(f"export/{one.form}")
        found.metrics |= {f"export/{one.form}/{key}": value for key, value in size.items()}
        found.table.append(
            {"format": str(one.form)}
            | size
            | {
                "kl_mean": close.kl_mean,
                "kl_p99": close.kl_p99,
                "perplexity_ratio": close.perplexity_ratio,
                "top1": close.top1,
                "loaded": one.exporter.measured_in,
            }
        )
        if one.form in p.max_kl and not close.kl_mean <= p.max_kl[one.form]:
            faults.append(f"{one.form}: mean KL {close.kl_mean:.3g} nats per token, at most {p.max_kl[one.form]:g}")
    faults += [
        f"{form}: ends {found.metrics[f'export/{form}/stopped_as_tuned']:.0%} of the answers that the tuned model ends "
        f"by itself, at least {p.min_stopped:.0%}"
        for form in asked
        if not found.metrics.get(f"export/{form}/stopped_as_tuned", 1.0) >= p.min_stopped
    ]
    if faults:
        raise GateError(
            "models/export: formats that are not the trained model (found, expected):\n  "
            + "\n  ".join(faults)
            + "\nLeave the format out of export.formats, or accept it with export.max_kl or export.min_stopped."
        )
    return found


def _in_runtime(
    form: str,
    told: Asked,
    reference_model: PreTrainedModel,
    predicted: Predictions,
    p: Export,
    e: Evaluate,
    merged: Path,
) -> dict[str, float]:
    """Stops, token probabilities and task score of the answers the runtime gave."""
    tokenizer = chat.load_tokenizer(merged)
    gaps = [
        gap
        for answer in told.session.answers[: p.probes]
        if answer.ids
        for gap in fidelity.gaps(
            fidelity.log_probs(reference_model, [*answer.prompt, *answer.ids], len(answer.prompt)),
            answer.top[: len(answer.ids)],
        )
    ]
    answered = told.answered()
    ended = [stopped for row, _, stopped in answered if predicted[row]["stops"]]
    metrics = {
        f"export/{form}/runtime/logprob_gap/max": max(gaps, default=0.0),
        f"export/{form}/runtime/logprob_gap/mean": sum(gaps) / len(gaps) if gaps else 0.0,
        f"export/{form}/runtime/answers": len(answered),
        f"export/{form}/runtime/stopped": sum(stopped for *_, stopped in answered) / len(answered),
    }
    if ended:
        metrics[f"export/{form}/stopped_as_tuned"] = sum(ended) / len(ended)
    else:
        print(f"{form}: the tuned model ended none of {len(answered)} answers: whether this file stops cannot be told.")
    if form not in p.answers:
        return metrics
    scores = task_score.differences(
        {row: tokenizer.decode(ids, skip_special_tokens=True) for row, ids, _ in answered},
        list(predicted.values()),
        samples=e.bootstrap_samples,
        confidence=e.confidence,
        seed=e.seed,
    )
    for name, difference in scores.items():
        stem = f"export/{form}/task/{name}"
        metrics |= {
            f"{stem}/delta": difference.delta,
            f"{stem}/low": difference.low,
            f"{stem}/high": difference.high,
        }
    return metrics


def check_chat(file: Path, session: Session, tokenizer: PreTrainedTokenizerFast) -> None:
    """Hold the runtime's tokens of a three-turn chat, template included, to those of training.

    Raises: GateError, with the first place where they differ.
    """
    expected = chat.prompt_ids(tokenizer, THREE_TURNS)
    found = session.tokens[0]
    if found == expected:
        return
    ends = min(len(expected), len(found))
    at = next((place for place in range(ends) if expected[place] != found[place]), ends)
    raise GateError(
        f"{file.name}: its runtime writes a chat otherwise than training did, from token {at}: found "
        f"{tokenizer.decode(found[at : at + 8])!r}, expected {tokenizer.decode(expected[at : at + 8])!r}. "
        "Check export.gguf_pre_tokenizer and the chat template of models/base."
    )


def context(merged: Path) -> int:
    """Tokens the model was made for."""
    return int(AutoConfig.from_pretrained(merged, local_files_only=True).max_position_embeddings)
