"""The page a person reads after a run: verdict, figures with intervals, answers side by side, training curve, errors.

One self-contained HTML file: no network, no scripts, no times; equal inputs give equal bytes.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib import page
from stages.lib.comparison import Line, Prediction, main_measure
from stages.lib.measures import SCORES
from stages.lib.schema.evaluate import Evaluate

SHOWN = 4  # rows of each task shown side by side
WORST = 6  # worst tuned answers shown
NAMES = {
    "loss": "Loss per token (nats)",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "exact_match": "Exact match",
    "json_valid": "Valid JSON",
    "field_f1": "Field F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "stops": "Stops by itself",
}
MEANINGS = {
    "loss": "negative log-likelihood of the reference, end-of-turn included, per token; lower is better",
    "perplexity": "exponential of the loss; lower is better",
    "bits_per_byte": "the loss over the bytes of the reference, fit for any tokenizer; lower is better",
    "exact_match": "answer and reference are the same text",
    "json_valid": "the whole answer is one JSON object, nothing around it",
    "field_f1": "F1 over pairs of name and value of the JSON object; white space is evened out, letter case counts",
    "rouge_l": "F-measure of the longest common subsequence of words",
    "chrf": "F-score of character 1- to 6-grams",
    "stops": "the model ends its turn before the limit of new tokens",
}
ALIKE = 0.5  # share of words in common from which differences are shown word by word
PIECES = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A run of text: `same` as in the reference, `extra` in the answer only, `missing` in the reference only."""

    kind: str
    text: str


def render(
    lines: Sequence[Line],
    predictions: Sequence[Prediction],
    metrics: Mapping[str, float],
    *,
    questions: Mapping[str, Sequence[Mapping[str, str]]],
    limits: Mapping[str, int],
    curve: Sequence[Mapping[str, str]],
    counts: Mapping[str, float],
    model: str,
    p: Evaluate,
) -> str:
    """The page as HTML.

    Args: metrics: of the stage, for what is no comparison of arms. questions: turns of each row's prompt, by row id.
        limits: new tokens allowed, by task. curve: rows of plots/train.csv. counts: metrics of dedup_split.
        model: name of the base model.
    """
    cards = side_by_side(predictions)
    return page.fill(
        "evaluation_page.html.jinja",
        differences=differences,
        figure=figure,
        signed=signed,
        strip=interval_strip,
        model=model,
        verdict=verdict(lines),
        tasks=[
            {
                "name": task,
                "rows": sum(card["task"] == task for card in cards),
                "limit": limits[task],
                "base_16bit": metrics.get(f"test/{task}/loss/base_16bit"),
                "lines": [line for line in lines if line.task == task],
                "main": main_measure(lines, task),
                "cards": [card for card in cards if card["task"] == task][:SHOWN],
            }
            for task in sorted(limits)
        ],
        worst=worst(cards, lines)[:WORST],
        questions=questions,
        curve=training_curve(curve),
        counts=counts,
        fewshot=p.fewshot,
        samples=p.bootstrap_samples,
        percent=f"{100 * p.confidence:g}%",
        arms={"base": "Base", "fewshot": f"Base + {p.fewshot} examples", "tuned": "Tuned"},
        names=NAMES,
        meanings={name: MEANINGS[name] for name in NAMES if any(line.measure == name for line in lines)},
        scores=[*SCORES, "stops"],
    )


def verdict(lines: Sequence[Line]) -> str:
    """What came out, in one sentence: the tuned model against both baselines on the main measure of each task."""
    parts: list[str] = []
    for task in sorted({line.task for line in lines}):
        line = main_measure(lines, task)
        base, fewshot = line.verdict("base"), line.verdict("fewshot")
        if base == fewshot:
            found = f"{_than(base)} the base model, with and without examples"
        else:
            found = f"{_than(base)} the base model, and {_than(fewshot)} the base model with examples"
        values = {arm: figure(value) for arm, value in line.arms.items()}
        figures = f"{NAMES[line.measure]} {values['tuned']} against {values['base']} and {values['fewshot']}"
        parts.append(f"on {task}, {'it' if parts else 'the tuned model'} {found} ({figures})")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _than(word: str) -> str:
    return "cannot be told from" if word == "cannot tell" else f"is {word} than"


def side_by_side(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One entry per test row, sorted by id: task, reference, and for each arm its prediction."""
    cards: dict[str, dict[str, Any]] = {}
    for row in sorted(predictions, key=lambda row: row["id"]):
        card = cards.setdefault(
            row["id"], {"id": row["id"], "task": row["task"], "source": row["source"], "reference": row["reference"]}
        )
        card[row["arm"]] = row
    return list(cards.values())


def answers_table(predictions: Sequence[Prediction]) -> list[dict[str, str]]:
    """Flat rows for a table: id, task, reference, and the answer of each arm."""
    return [
        {name: card[name] for name in ("id", "task", "reference")}
        | {arm: card[arm]["answer"] for arm in ("base", "fewshot", "tuned")}
        for card in side_by_side(predictions)
    ]


def worst(cards: Sequence[Mapping[str, Any]], lines: Sequence[Line]) -> list[Mapping[str, Any]]:
    """Rows with the lowest tuned score on their task's main measure; among equals the least likely reference first."""
    measures = {card["task"]: main_measure(lines, card["task"]).measure for card in cards}

    def order(card: Mapping[str, Any]) -> tuple[float, float, str]:
        tuned = card["tuned"]
        return tuned[measures[card["task"]]], -tuned["nll"] / tuned["n_tokens"], card["id"]

    return sorted(cards, key=order)


def differences(answer: str, reference: str) -> list[Piece]:
    """The answer with what it adds and what it leaves out, word by word.

    answer "a b", reference "a c"  ->  same "a ", missing "c", extra "b"
    An answer that has little in common with the reference is all extra: chance matches would only confuse the eye.
    """
    ours, theirs = PIECES.findall(answer), PIECES.findall(reference)
    matcher = difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False)
    if answer and matcher.ratio() < ALIKE:
        return [Piece("extra", answer)]
    found = []
    for tag, start, end, ref_start, ref_end in matcher.get_opcodes():
        if tag == "equal":
            found.append(Piece("same", "".join(ours[start:end])))
        else:
            found += [Piece("missing", "".join(theirs[ref_start:ref_end])), Piece("extra", "".join(ours[start:end]))]
    return [piece for piece in found if piece.text]


def figure(value: float) -> str:
    """A figure with as many digits as it is worth: 0.713, 8.20, 154."""
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def signed(value: float) -> str:
    """A difference with its sign, a true minus sign: +0.713."""
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + figure(abs(value))


def interval_strip(line: Line, baseline: str) -> dict[str, float]:
    """Where zero, interval and difference stand on a strip 0 to 100 wide; scores share the scale -1 to 1."""
    difference = line.against[baseline]
    reach = max(abs(other.low) for other in line.against.values())
    reach = max(reach, *(abs(other.high) for other in line.against.values()), 1e-12)
    if line.higher_is_better:
        reach = 1.0

    def place(value: float) -> float:
        return round(50 + 46 * value / reach, 2)

    low, high = place(difference.low), place(difference.high)
    return {"low": low, "width": round(max(high - low, 1.2), 2), "delta": place(difference.delta)}


def training_curve(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Training and validation loss over optimizer steps, as SVG coordinates in a box 640 wide and 220 high.

    Args: rows: plots/train.csv, one per step, with the columns step, loss, val_loss. A row repeats the last validation
        loss until the next is measured: only where it changes stands a point.
    """
    training = [(float(row["step"]), float(row["loss"])) for row in rows]
    validation = [
        (float(row["step"]), float(row["val_loss"]))
        for before, row in zip([None, *rows], rows, strict=False)
        if before is None or row["val_loss"] != before["val_loss"]
    ]
    last_step = max(step for step, _ in training)
    scale = _ceiling(max(loss for _, loss in (*training, *validation)))

    def place(step: float, loss: float) -> tuple[float, float]:
        return round(44 + 580 * step / max(last_step, 1), 1), round(190 - 176 * loss / scale, 1)

    return {
        "series": {
            name: {
                "line": " ".join(f"{x},{y}" for x, y in (place(*point) for point in points)),
                "dots": [place(*point) for point in points] if name == "validation" else [],
                "first": figure(points[0][1]),
                "last": figure(points[-1][1]),
            }
            for name, points in (("training", training), ("validation", validation))
        },
        "ticks": [(f"{scale * part / 4:g}", place(0, scale * part / 4)[1]) for part in range(5)],
        "last_step": int(last_step),
    }


def _ceiling(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, so that quarters of it are short numbers."""
    power = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 0.1
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
