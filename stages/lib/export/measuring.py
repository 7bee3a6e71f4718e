"""Measure every rung of the ladder against the trained model, formats loaded again; one model at a time in memory."""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedTokenizerFast

from stages.lib import arms, chat, fewshot, fidelity, held_out, models, numerics, records, resident
from stages.lib.comparison import TUNED
from stages.lib.errors import GateError
from stages.lib.export import ladder, round_trip, task_score
from stages.lib.export.formats.exporter import Request, Session, Size, Trained
from stages.lib.export.writing import Written
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.export import Export
from stages.lib.schema.numerics import Numerics, Quantization

Predictions = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Rows of predictions.parquet by arm, then by row id."""

BITS_OF_REST = 16  # of weights that numerics.quantization leaves alone, as published
MIB = 2**20


@dataclass
class Found:
    """metrics: flat. measured: speeds and memory of this run only, no output holds them."""

    metrics: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


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
    written: Sequence[Written],
    trained: Trained,
    test: Sequence[Mapping[str, Any]],
    chats: round_trip.Expected,
    p: Export,
    e: Evaluate,
) -> tuple[dict[str, Asked], Found]:
    """Let each format write chats and answer test rows in its own runtime, every task represented.

    Raises: GateError, when files or runtime write a chat otherwise than training did; ExternalError, when a runtime
    crashes.
    """
    every = arms.questions(chats.tokenizer, test)
    limits = {
        task: arms.answer_limit(
            [question for question in every if question.row["task"] == task],
            margin=e.answer_margin,
            max_new_tokens=e.max_new_tokens,
        )
        for task in {question.row["task"] for question in every}
    }
    questions = {question.row["id"]: question for question in every}
    found, asked = Found(), {}
    for one in written:
        round_trip.check_files(one.path, chats)
        count = p.answers[one.form] if one.form in p.answers else p.probes
        chosen = [questions[row["id"]] for row in held_out.spread(test, max(count, p.probes))]
        request = Request(
            chats=chats.chats,
            prompts=[question.prompt for question in chosen],
            stop_ids=chats.stop_ids,
            max_new_tokens=max(limits[question.row["task"]] for question in chosen) + 1,
        )
        session, peak = resident.peak_mib(partial(one.exporter.ask, one.path, request, trained))
        counts = round_trip.check_session(one.path.name, session, chats)
        asked[str(one.form)] = Asked(chosen, limits, session)
        stem = ladder.prefix(one.form)
        found.metrics |= {f"{stem}/round_trip/{name}": count for name, count in counts.items()}
        tokens = sum(len(answer.ids) for answer in session.answers)
        found.measured[f"{stem}/tokens_per_second"] = round(tokens / session.seconds, 2)
        found.measured |= _peak(stem, session.peak_mib or peak)
    return asked, found


def _peak(stem: str, mib: float | None) -> dict[str, float]:
    return {} if mib is None else {f"{stem}/peak_mib": round(mib, 1)}


def measure(
    written: Sequence[Written],
    asked: Mapping[str, Asked],
    trained: Trained,
    rows: Sequence[Mapping[str, Any]],
    predicted: Predictions,
    *,
    p: Export,
    e: Evaluate,
    n: Numerics,
) -> Found:
    """Measure base, base with examples, merged model and every format against the trained one: 4-bit base + adapter.

    Args: rows: held-out rows.
    Raises: GateError, when a format is further from the trained model than export.max_kl allows, or does not stop.
    """
    tokenizer = chat.load_tokenizer(trained.merged)
    ids = [[int(token) for token in held_out.encode(tokenizer, row).input_ids] for row in rows]
    found, expected, quantized = _reference(trained, tokenizer, rows, ids, asked, predicted, p, e, n)

    merged, peak = resident.peak_mib(lambda: _merged(trained, expected, n))
    close, weights = merged
    found.metrics |= close.metrics("ladder/merged")
    found.measured |= _peak("ladder/merged", peak)
    found.metrics |= _sizes(trained, quantized, weights, with_examples="fewshot" in predicted)

    for one in written:
        stem = ladder.prefix(one.form)
        size = asdict(one.exporter.size(one.path, weights))
        close = fidelity.compare(expected, one.exporter.log_probs(one.path, trained))
        gc.collect()
        found.metrics |= close.metrics(stem) | {f"{stem}/{key}": value for key, value in size.items()}
    gate(written, found.metrics, p)
    return found


def _reference(
    trained: Trained,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[int]],
    asked: Mapping[str, Asked],
    predicted: Predictions,
    p: Export,
    e: Evaluate,
    n: Numerics,
) -> tuple[Found, fidelity.Reference, tuple[int, float]]:
    """What one load of 4-bit base and adapter tells: the reference; the base, adapter off; the runtimes' answers.

    Returns: figures; the reference; see quantized_bits.
    """
    found = Found()

    def loaded() -> tuple[PeftModel, fidelity.Reference]:
        on_cpu = numerics.resolve(n).device == "cpu"
        model = models.load_tuned(trained.base, trained.adapter, n, dense=on_cpu)
        return model, fidelity.reference(fidelity.of(model), ids)

    (model, expected), peak = resident.peak_mib(loaded)
    found.measured |= _peak("ladder/tuned", peak)
    found.metrics |= fidelity.itself(expected).metrics("ladder/tuned")
    with model.disable_adapter():
        found.metrics |= fidelity.compare(expected, fidelity.of(model)).metrics("ladder/base")
        if "fewshot" in predicted and (longer := _with_examples(trained, tokenizer, rows, expected, e)):
            close = fidelity.compare(expected, fidelity.behind(model, longer))
            found.metrics |= close.metrics("ladder/fewshot")
    for form, told in asked.items():
        found.metrics |= _in_runtime(form, told, model, tokenizer, predicted[TUNED], p, e)
    asked_most = max((told for form, told in asked.items() if form in p.answers), key=_answered, default=None)
    for arm in set(predicted) & {"base", "fewshot"}:
        ids_asked = {question.row["id"] for question in asked_most.questions} if asked_most else set(predicted[TUNED])
        answers = {id: row["answer"] for id, row in predicted[arm].items() if id in ids_asked}
        found.metrics |= _scores(f"ladder/{arm}", answers, predicted[TUNED], e)
    return found, expected, quantized_bits(model, n)


def _answered(told: Asked) -> int:
    return len(told.questions)


def _with_examples(
    trained: Trained,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    expected: fidelity.Reference,
    e: Evaluate,
) -> list[list[int]] | None:
    """Token ids of the rows behind the examples that evaluate shows; None where a row does not end them as it stands.

    So it is with plain texts, and where a template writes a turn otherwise the further down it is.
    """
    examples = fewshot.choose(trained.splits / "train.parquet", {row["task"] for row in rows}, n=e.fewshot, seed=e.seed)
    found = []
    for row, ids in zip(rows, expected.rows, strict=True):
        turns = records.conversation(row)
        if turns is None:
            return None
        shown = fewshot.conversation(examples[row["task"]], turns)
        longer = [int(token) for token in chat.encode(tokenizer, shown, row["tools"]).input_ids]
        tail = list(ids[expected.skipped :])
        if longer[-len(tail) :] != tail:
            return None
        found.append(longer)
    return found


def _merged(trained: Trained, expected: fidelity.Reference, n: Numerics) -> tuple[fidelity.Fidelity, int]:
    """The merged model against the trained one; how many weights it has."""
    model = models.load_dense(trained.merged, n)
    return fidelity.compare(expected, fidelity.of(model)), sum(weight.numel() for weight in model.parameters())


def quantized_bits(model: PeftModel, n: Numerics) -> tuple[int, float]:
    """Weights that numerics.quantization holds in few bits, and how many bits each takes, scales included."""
    base = model.get_base_model()
    bits = {
        Quantization.none: float(BITS_OF_REST),
        Quantization.int8: 8.0,
    }.get(n.quantization, 4 + (8 / 64 + 32 / (64 * 256) if n.double_quantization else 32 / 64))
    layers = [
        layer
        for name, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and layer is not base.get_output_embeddings()
        and not any(part in name for part in ("lora_", "modules_to_save"))
    ]
    return sum(layer.in_features * layer.out_features for layer in layers), bits


def _sizes(trained: Trained, quantized: tuple[int, float], weights: int, *, with_examples: bool) -> dict[str, float]:
    """MiB and bits per weight of what is not exported; the base as it is held in memory, not as models/base stores it.

    Args: quantized: see quantized_bits. weights: of the merged model.
    """
    count, bits = quantized
    base = (count * bits + (weights - count) * BITS_OF_REST) / 8
    adapter = (trained.adapter / models.WEIGHTS).stat().st_size
    merged = sum(file.stat().st_size for file in trained.merged.glob("*.safetensors"))
    held = {"base": base, "tuned": base + adapter, "merged": merged}
    held |= {"fewshot": base} if with_examples else {}
    return {
        f"ladder/{name}/{key}": value
        for name, size in held.items()
        for key, value in asdict(Size(round(size / MIB, 2), round(size * 8 / weights, 3))).items()
        if key != "fallback_tensors"
    }


def gate(written: Sequence[Written], metrics: Mapping[str, float], p: Export) -> None:
    """Raises: GateError, naming every format that is not the trained model."""
    faults = []
    for one in written:
        stem = ladder.prefix(one.form)
        kl, limit = metrics[f"{stem}/kl/mean"], p.max_kl.get(one.form, math.inf)
        if not kl <= limit:
            faults.append(f"{one.form}: mean KL {kl:.3g} nats per token, at most {limit:g}")
        stopped = metrics.get(f"{stem}/stopped_as_tuned", 1.0)
        if not stopped >= p.min_stopped:
            faults.append(
                f"{one.form}: ends {stopped:.0%} of the answers that the tuned model ends by itself, at least "
                f"{p.min_stopped:.0%}"
            )
    if faults:
        raise GateError(
            "models/export: formats that are not the trained model (found, expected):\n  "
            + "\n  ".join(faults)
            + "\nLeave the format out of export.formats, or accept it with export.max_kl or export.min_stopped."
        )


def _in_runtime(
    form: str,
    told: Asked,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    tuned: Mapping[str, Mapping[str, Any]],
    p: Export,
    e: Evaluate,
) -> dict[str, float]:
    """Stops, token probabilities and task score of the answers the runtime gave."""
    stem = ladder.prefix(form)
    gaps = [
        gap
        for answer in told.session.answers[: p.probes]
        if answer.ids and answer.top
        for gap in fidelity.gaps(
            fidelity.log_probs(model, [*answer.prompt, *answer.ids], len(answer.prompt)), answer.top[: len(answer.ids)]
        )
    ]
    answered = told.answered()
    ended = [stopped for row, _, stopped in answered if tuned[row]["stops"]]
    metrics = {
        f"{stem}/runtime/answers": len(answered),
        f"{stem}/runtime/stopped": sum(stopped for *_, stopped in answered) / len(answered),
    }
    if gaps:
        metrics[f"{stem}/runtime/logprob_gap/max"] = max(gaps)
        metrics[f"{stem}/runtime/logprob_gap/mean"] = sum(gaps) / len(gaps)
    if ended:
        metrics[f"{stem}/stopped_as_tuned"] = sum(ended) / len(ended)
    else:
        print(f"{form}: the tuned model ended none of {len(answered)} answers: whether this file stops cannot be told.")
    if form in p.answers:
        answers = {row: tokenizer.decode(ids, skip_special_tokens=True) for row, ids, _ in answered}
        metrics |= _scores(stem, answers, tuned, e)
    return metrics


def _scores(
    stem: str, answers: Mapping[str, str], tuned: Mapping[str, Mapping[str, Any]], e: Evaluate
) -> dict[str, float]:
    """Each task's score minus tuned's on the rows that were answered, with its interval."""
    scores = task_score.differences(
        answers, list(tuned.values()), samples=e.bootstrap_samples, confidence=e.confidence, seed=e.seed
    )
    return {f"{stem}/task/{name}/{end}": value for name, score in scores.items() for end, value in vars(score).items()}


def by_arm(rows: Sequence[Mapping[str, Any]]) -> Predictions:
    """Rows of predictions.parquet, see Predictions."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["id"]] = row
    return found


def of_merge(merged: Mapping[str, float]) -> dict[str, float]:
    """The merged model's task scores minus tuned's, as stage merge found them, under the ladder's names."""
    start = "merge/task/"
    return {key.replace(start, "ladder/merged/task/"): merged[key] for key in merged if key.startswith(start)}


def context(merged: Path) -> int:
    """Tokens the model was made for."""
    return int(AutoConfig.from_pretrained(merged, local_files_only=True).max_position_embeddings)
