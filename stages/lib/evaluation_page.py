"""The page a person reads after a run: verdict, figures with intervals, confusions, failures, answers, training.

One self-contained HTML file: no network, no times; equal inputs give equal bytes. Its script only sorts and filters;
without it everything is shown.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib import page
from stages.lib.comparison import Line, Prediction, Slice, main_measure
from stages.lib.measures import classification, json_text
from stages.lib.ratings import Rated
from stages.lib.schema.evaluate import Evaluate

SHOWN = 4  # answers of each task shown before more are asked for
KEPT = 120  # answers of each task on the page at all
WORST = 3  # answers shown of each kind of failure
CONFUSED = 12  # pairs of labels listed
LABELS = 100  # labels in a heat map at most
NAMES = {
    "loss": "Loss per token (nats)",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "exact_match": "Exact match",
    "json_valid": "Valid JSON",
    "json_schema": "Fields as in the reference",
    "field_f1": "Field F1",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "stops": "Stops by itself",
}
MEANINGS = {
    "loss": "negative log-likelihood of the reference, end-of-turn included, per token; lower is better",
    "perplexity": "exponential of the loss; lower is better",
    "bits_per_byte": "the same likelihood per byte of the reference, comparable between tokenizers; lower is better",
    "accuracy": "share of rows whose label is the predicted one",
    "macro_f1": "mean over labels of each label's F1: rare labels count as much as frequent ones",
    "exact_match": "answer and reference are the same text",
    "json_valid": "the whole answer is one JSON object, nothing around it",
    "json_schema": "the answer is a JSON object with the reference's fields, and values of the same types",
    "field_f1": "F1 over pairs of name and value of the JSON object; white space is evened out, letter case counts",
    "token_f1": "F1 over the words of answer and reference, in any order, without case, punctuation and articles",
    "rouge_l": "F-measure of the longest common subsequence of words",
    "bleu": "precision of 1- to 4-grams of words, with a penalty for brevity; mean over rows, not of the corpus",
    "chrf": "F-score of character 1- to 6-grams",
    "stops": "the model ends its turn before the limit of new tokens",
}
LOW_OVERLAP = 0.2  # ROUGE-L below which an answer and its reference say different things
FAILURES = {
    "wrong label": "another label was found likelier, or written",
    "empty": "no answer at all",
    "repeats itself": "most of its runs of three words come more than once",
    "not stopped": "it ran into the limit of new tokens",
    "invalid JSON": "a program could not read it",
    "missing fields": "a field of the reference is not there",
    "extra fields": "a field is there that the reference does not have",
    "wrong values": "the fields are right, a value is not",
    "little in common": f"ROUGE-L below {LOW_OVERLAP}",
}
ALIKE = 0.5  # share of words in common from which differences are shown word by word
PIECES = re.compile(r"\w+|\s+|[^\w\s]")
_THAN = {"base": "the base model", "fewshot": "few-shot prompting"}


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
    questions: Mapping[str, Sequence[Mapping[str, Any]]],
    limits: Mapping[str, int],
    curve: Sequence[Mapping[str, str]],
    counts: Mapping[str, float],
    model: str,
    p: Evaluate,
    slices: Sequence[Slice] = (),
    forgetting: Sequence[Line] = (),
    rated: Rated | None = None,
) -> str:
    """The page as HTML.

    Args: metrics: of the stage, for what is no comparison of arms. questions: turns of each row's prompt, by row id.
        limits: new tokens allowed, by task. curve: rows of plots/train.csv. counts: metrics of dedup_split.
        model: name of the base model. forgetting: lines of general text, base and tuned.
        rated: what raters chose on rate.html.
    """
    arms = {"base": "Base", "fewshot": f"Base + {p.fewshot} examples"}
    arms |= {arm: arm for line in lines for arm in line.arms if arm not in (*arms, "tuned")} | {"tuned": "Tuned"}
    arms = {arm: label for arm, label in arms.items() if any(arm in line.arms for line in lines)}
    cards = [card for card in side_by_side(predictions) if "tuned" in card]
    return page.fill(
        "evaluation_page.html.jinja",
        differences=differences,
        failure=failure,
        figure=figure,
        signed=signed,
        p_value=p_value,
        strip=interval_strip,
        bar=bar,
        model=model,
        verdict=re.split(r"(\([^()]*\))", verdict(lines, forgetting)),
        tasks=[
            _task(task, lines, slices, [card for card in cards if card["task"] == task], arms)
            | {"limit": limits[task], "base_16bit": metrics.get(f"test/{task}/loss/base_16bit")}
            for task in sorted({line.task for line in lines})
        ],
        sources=sorted({card["source"] for card in cards}),
        forgetting=forgetting,
        rated=rated or Rated(),
        questions=questions,
        curve=training_curve(curve),
        traces=[trace(curve, name, label) for name, label in TRACES.items() if any(row.get(name) for row in curve)],
        counts=counts,
        fewshot=p.fewshot,
        samples=p.bootstrap_samples,
        percent=f"{100 * p.confidence:g}%",
        arms=arms,
        baselines=[arm for arm in arms if arm != "tuned"],
        hardest=_hardest(arms),
        names=NAMES,
        shown=SHOWN,
        meanings={name: MEANINGS[name] for name in NAMES if any(line.measure == name for line in lines)},
    )


def _task(
    task: str,
    lines: Sequence[Line],
    slices: Sequence[Slice],
    cards: Sequence[Mapping[str, Any]],
    arms: Mapping[str, str],
) -> dict[str, Any]:
    main = main_measure(lines, task)
    by = dict.fromkeys(each.by for each in slices if each.task == task)
    labelled = [card["tuned"] for card in cards if card["tuned"]["predicted"] is not None]
    found = classification.confusion([row["label"] for row in labelled], [row["predicted"] for row in labelled])
    return {
        "name": task,
        "rows": len(cards),
        "is_generated": any(card["tuned"]["stops"] is not None for card in cards),
        "lines": [line for line in lines if line.task == task],
        "main": main,
        "slices": {
            name: [
                each
                for each in slices
                if (each.task, each.by, each.measure) == (task, name, main.measure) and each.against
            ]
            for name in by
        },
        "confusion": confusion(found) if labelled else None,
        "failures": failures(cards, main, list(arms)),
        "cards": cards[:KEPT],
    }


def verdict(lines: Sequence[Line], forgetting: Sequence[Line] = ()) -> str:
    """What came out, in one sentence: the tuned model against every other arm on the main measure of each task.

    Tasks with the same outcome share one clause. Better than the base alone is not enough where the same is had by
    showing it examples: that is said.
    """
    clauses: dict[str, list[str]] = {}
    for task in sorted({line.task for line in lines}):
        line = main_measure(lines, task)
        clauses.setdefault(_relation(line), []).append(f"on {task} ({_figures(line)})")
    parts = [f"{relation} {_list(places)}" for relation, places in clauses.items()]
    sentence = "; ".join([f"the tuned model {parts[0]}", *(f"it {part}" for part in parts[1:])])
    for line in forgetting[:1]:
        word = {
            "better": "general text is not forgotten",
            "worse": "general text is partly forgotten",
            "cannot tell": "no forgetting of general text can be told",
        }[line.verdict("base")]
        change = 100 * line.against["base"].delta / line.arms["base"]
        figures = f"{_named(line)} {brief(line.arms['tuned'])} against {brief(line.arms['base'])}"
        sentence += f"; {word} ({figures}, {brief(change, sign=True)}%)"
    return sentence[0].upper() + sentence[1:] + "."


def _relation(line: Line) -> str:
    told = {arm: line.verdict(arm) for arm in line.against}
    base, fewshot = told.get("base"), told.get("fewshot")
    one = {
        "better": "is better than {}",
        "worse": "is worse than {}",
        "cannot tell": "cannot be told from {}",
    }
    if base and fewshot and base == fewshot:
        link = "nor from" if base == "cannot tell" else "and than"
        words = f"{one[base].format(_THAN['base'])} {link} {_THAN['fewshot']}"
    elif base and fewshot:
        # "not better than few-shot prompting" is what decides whether the training was worth it
        last = {
            "better": "is better than {}",
            "worse": "is not better than {} but worse",
            "cannot tell": "is not shown to be better than {}",
        }[fewshot]
        link = "but" if "better" in (base, fewshot) else "and"
        words = f"{one[base].format(_THAN['base'])}, {link} {last.format(_THAN['fewshot'])}"
    else:
        words = " and ".join(one[word].format(_THAN[arm]) for arm, word in told.items() if arm in _THAN)
    others = [one[word].format(arm) for arm, word in told.items() if arm not in _THAN]
    return ", ".join([words, *others] if words else others)


def _figures(line: Line) -> str:
    """field F1 0.74 against 0.33, difference +0.41 [+0.31, +0.51]: against few-shot prompting where that was tried."""
    hardest = _hardest(line.against)
    found = line.against[hardest]
    interval = f"{brief(found.delta, sign=True)} [{brief(found.low, sign=True)}, {brief(found.high, sign=True)}]"
    where = "" if found.n == line.n["tuned"] else f" on the same {found.n} rows"
    is_by_sign_test = line.verdict(hardest) == "cannot tell" and not found.low <= 0 <= found.high
    doubt = f", but p {p_value(found.p_adjusted)} by the corrected sign test" if is_by_sign_test else ""
    figures = f"{_named(line)} {brief(line.arms['tuned'])} against {brief(line.arms[hardest])}"
    return f"{figures}, difference{where} {interval}{doubt}"


def _hardest(arms: Iterable[str]) -> str:
    """What is hardest to be better than: few-shot prompting, where it was tried."""
    names = list(arms)
    return "fewshot" if "fewshot" in names else names[0]


def _named(line: Line) -> str:
    """The measure's name inside a sentence: accuracy, ROUGE-L."""
    name = NAMES[line.measure]
    return name if name == "chrF" or name[1:2].isupper() else name[0].lower() + name[1:]


def _list(words: Sequence[str]) -> str:
    return " and ".join(([", ".join(words[:-1])] if words[1:] else []) + [words[-1]])


def side_by_side(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One entry per test row, sorted by id: task, source, reference, and each arm's prediction where it made one."""
    cards: dict[str, dict[str, Any]] = {}
    for row in sorted(predictions, key=lambda row: row["id"]):
        card = cards.setdefault(row["id"], {name: row[name] for name in ("id", "task", "source", "reference")})
        card[row["arm"]] = row
    return list(cards.values())


def answers_table(predictions: Sequence[Prediction]) -> list[dict[str, str]]:
    """Flat rows for a table: id, task, reference, and the answer of each arm."""
    arms = sorted({row["arm"] for row in predictions})
    return [
        {name: card[name] for name in ("id", "task", "reference")}
        | {arm: card[arm]["answer"] if arm in card else "" for arm in arms}
        for card in side_by_side(predictions)
    ]


def failure(row: Prediction) -> str | None:
    """The kind of failure of one answer, the first of FAILURES that it is, or None."""
    if row["predicted"] is not None:
        return None if row["predicted"] == row["label"] else "wrong label"
    if row["exact_match"] == 1:
        return None
    answer = row["answer"]
    if not answer.strip():
        return "empty"
    words = answer.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    if len(runs) >= 10 and len(set(runs)) < len(runs) / 2:
        return "repeats itself"
    if row["stops"] == 0:
        return "not stopped"
    if row["json_valid"] is None:
        return "little in common" if row["rouge_l"] < LOW_OVERLAP else None
    fields = json_text.read_object(answer)
    if fields is None:
        return "invalid JSON"
    ours, theirs = ({name for name, _ in found or ()} for found in (fields, json_text.read_object(row["reference"])))
    if theirs - ours:
        return "missing fields"
    if ours - theirs:
        return "extra fields"
    return "wrong values" if row["field_f1"] < 1 else None


def failures(cards: Sequence[Mapping[str, Any]], main: Line, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Kinds of failure, the tuned model's most frequent first: kind, how often in each arm, its worst tuned answers."""
    kinds = {arm: Counter(failure(card[arm]) for card in cards if arm in card) for arm in arms}
    of_tuned: dict[str | None, list[Mapping[str, Any]]] = {}
    for card in worst(cards, main):
        of_tuned.setdefault(failure(card["tuned"]), []).append(card)
    found = [
        {
            "kind": kind,
            "meaning": meaning,
            "counts": {arm: kinds[arm][kind] for arm in arms},
            "shares": {arm: kinds[arm][kind] / max(1, kinds[arm].total()) for arm in arms},
            "cards": of_tuned.get(kind, [])[:WORST],
        }
        for kind, meaning in FAILURES.items()
        if any(kinds[arm][kind] for arm in arms)
    ]
    return sorted(found, key=lambda each: -each["counts"]["tuned"])  # sorted keeps the order of FAILURES among equals


def worst(cards: Sequence[Mapping[str, Any]], main: Line) -> list[Mapping[str, Any]]:
    """Rows with the lowest tuned score on the main measure; among equals the least likely reference first."""

    def order(card: Mapping[str, Any]) -> tuple[float, float, str]:
        tuned = card["tuned"]
        return tuned[main.measure], -tuned["nll"] / tuned["n_tokens"], card["id"]

    return sorted(cards, key=order)


def confusion(found: classification.Confusion) -> dict[str, Any]:
    """Labels against predictions as a heat map in a box of 10 x 10 per cell, the pairs confused most, figures by label.

    With more than LABELS labels, the map holds those with most errors.
    """
    counts, mistakes = found.counts, found.mistakes()
    rows, columns, right = counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist(), counts.diagonal().tolist()
    names = dict(enumerate(found.labels))
    errors = {place: rows[place] + columns[place] - 2 * right[place] for place in names}
    shown = sorted(sorted(names, key=lambda place: (-errors[place], names[place]))[:LABELS])
    cells = [
        {
            "x": 10 * x,
            "y": 10 * y,
            "kind": "right" if row == column else "wrong",
            "opacity": f"{(counts[row, column] / rows[row]) ** 0.5:.2f}",
            "title": f"{names[row]} \N{RIGHTWARDS ARROW} {names[column]}: {counts[row, column]} of {rows[row]}",
        }
        for y, row in enumerate(shown)
        for x, column in enumerate(shown)
        if counts[row, column]
    ]
    of_label = dict(zip(found.labels, rows, strict=True))
    by_label = [
        {
            "label": name,
            "n": rows[place],
            "recall": right[place] / rows[place] if rows[place] else None,
            "precision": right[place] / columns[place] if columns[place] else None,
            "f1": 2 * right[place] / (rows[place] + columns[place]),
        }
        for place, name in names.items()
    ]
    return {
        "labels": [names[place] for place in shown],
        "left_out": len(names) - len(shown),
        "cells": cells,
        "pairs": [
            {"label": label, "predicted": predicted, "n": n, "share": n / of_label[label]}
            for label, predicted, n in mistakes[:CONFUSED]
        ],
        "by_label": sorted(by_label, key=lambda each: (each["f1"], each["label"])),
        "wrong": sum(n for _, _, n in mistakes),
    }


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
    return _sign(value) + figure(abs(value))


def brief(value: float, *, sign: bool = False) -> str:
    """A figure of a sentence: 0.71, 8.2, 154; with its sign +0.71."""
    text = f"{abs(value):.2f}" if abs(value) < 2 else f"{abs(value):.1f}" if abs(value) < 100 else f"{abs(value):,.0f}"
    return (_sign(value) if sign or value < 0 else "") + text


def _sign(value: float) -> str:
    return "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def interval_strip(line: Line, baseline: str) -> dict[str, float]:
    """Where zero, interval and difference stand on a strip 0 to 100 wide; scores share the scale -1 to 1."""
    difference = line.against[baseline]
    reach = max(abs(end) for other in line.against.values() for end in (other.low, other.high, 1e-12))
    if line.higher_is_better:
        reach = 1.0

    def place(value: float) -> float:
        return round(50 + 46 * max(-1.0, min(1.0, value / reach)), 2)

    low, high = place(difference.low), place(difference.high)
    return {"low": low, "width": round(max(high - low, 1.2), 2), "delta": place(difference.delta)}


def bar(line: Line, arm: str) -> dict[str, float]:
    """An arm's figure and its interval as percentages of the width of a bar: scores of 1, others of the largest arm."""
    ends = line.intervals.get(arm, (line.arms[arm], line.arms[arm]))
    tops = [*line.arms.values(), *(high for _, high in line.intervals.values())]
    whole = 1.0 if line.higher_is_better else max(*tops, 1e-12)
    value, low, high = (round(100 * max(0.0, min(1.0, end / whole)), 2) for end in (line.arms[arm], *ends))
    return {"value": value, "low": low, "width": round(high - low, 2)}


TRACES = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm"}


def training_curve(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Training and validation loss over optimizer steps, as SVG coordinates in a box 640 wide and 220 high.

    Args: rows: plots/train.csv, one per step, with the columns step, loss, val_loss. A row repeats the last validation
        loss until the next is measured, or leaves it empty: only where it changes stands a point.
    """
    training = [(float(row["step"]), float(row["loss"])) for row in rows]
    measured = [row for row in rows if row["val_loss"]]
    validation = [
        (float(row["step"]), float(row["val_loss"]))
        for before, row in zip([None, *measured], measured, strict=False)
        if before is None or row["val_loss"] != before["val_loss"]
    ]
    last_step = max(step for step, _ in training)
    scale = _ceiling(max(loss for _, loss in (*training, *validation)))

    def place(step: float, loss: float) -> tuple[float, float]:
        return round(44 + 580 * step / max(last_step, 1), 1), round(190 - 176 * loss / scale, 1)

    named = {"training": training, "validation": validation}
    return {
        "series": {
            name: {
                "line": " ".join(f"{x},{y}" for x, y in (place(*point) for point in points)),
                "dots": [place(*point) for point in points] if name == "validation" else [],
                "first": figure(points[0][1]),
                "last": figure(points[-1][1]),
            }
            for name, points in named.items()
            if points
        },
        "ticks": [(f"{scale * part / 4:g}", place(0, scale * part / 4)[1]) for part in range(5)],
        "last_step": int(last_step),
    }


def trace(rows: Sequence[Mapping[str, str]], name: str, label: str) -> dict[str, str]:
    """One column of plots/train.csv over optimizer steps, as a line in a box 300 wide and 60 high, from zero up."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    last, top = max(1.0, points[-1][0]), max(max(value for _, value in points), 1e-12)
    line = " ".join(f"{300 * step / last:.1f},{58 - 54 * value / top:.1f}" for step, value in points)
    return {"label": label, "line": line, "last": f"{points[-1][1]:.3g}", "top": f"{top:.3g}"}


def _ceiling(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, so that quarters of it are short numbers."""
    power = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 0.1
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
