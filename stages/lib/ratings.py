"""Blind judgements of two answers to the same question: which pairs are shown, what raters chose, who won how surely.

    predictions -> pairs, sides shuffled -> a person (rate.html) or a model (commands/judge.py) chooses
                                            -> data/ratings/<any>.json -> win rate of the tuned model, agreement

A choice refers to what was compared by a hash over task, row, arms and answers. It therefore says which side was whose
without showing it, and outlives changes of other rows; a choice between answers that are no more counts for nothing.
"""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.lib import bootstrap, comparison, records
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import Evaluate

FOLDER = Path("data/ratings")
AGAINST = "fewshot"  # what the tuned model is shown beside
CHOICES = ("left", "right", "tie")
KINDS = ("person", "model")
TOGETHER = "people"  # all persons as one, when there are several
NAME = re.compile(r"(?!(?:people|agreement|ignored)$)[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_FILE = {"rater": str, "kind": str, "page": str, "pairs": list}
_PAIR = {"id": str, "task": str, "key": str, "choice": str}


@dataclass(frozen=True)
class Pair:
    """Two answers to one question: (arm, answer) at the left and at the right."""

    id: str
    task: str
    left: tuple[str, str]
    right: tuple[str, str]

    @property
    def key(self) -> str:
        """sha256 of what is compared and on which side; it gives no arm away."""
        return records.digest([self.task, self.id, *self.left, *self.right])

    def swapped(self) -> "Pair":
        return Pair(self.id, self.task, self.right, self.left)


@dataclass(frozen=True)
class Choice:
    """What one rater chose of one pair; orders: a model's choices when asked in both orders, by the pair's sides."""

    rater: str
    kind: str
    key: str
    choice: str
    orders: tuple[str, str] | None
    file: Path


@dataclass(frozen=True)
class Score:
    """How often a rater preferred the tuned model; a tie counts half. task: None for all of them together.

    same_place: share of pairs of which a model chose the same place, first or second, in both orders.
    """

    rater: str
    kind: str
    task: str | None
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float
    p_value: float
    same_place: float | None
    confidence: float = 0.95

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def verdict(self) -> str:
        """`better` or `worse` for the tuned model; `cannot tell` when the interval holds one half or too few decide.

        Of few choices that are all alike the interval has no width: then the sign test alone keeps from a verdict.
        """
        if self.low <= 0.5 <= self.high or self.p_value > 1 - self.confidence:
            return "cannot tell"
        return "better" if self.low > 0.5 else "worse"


@dataclass(frozen=True)
class Agreement:
    """Two raters over the pairs that both judged; kappa is None where chance alone would make them agree always."""

    raters: tuple[str, str]
    n: int
    share: float
    kappa: float | None


@dataclass(frozen=True)
class Rated:
    """scores: by rater, people together first, all tasks before each. ignored: choices of answers since changed."""

    scores: Sequence[Score] = ()
    agreements: Sequence[Agreement] = ()
    ignored: int = 0


def pairs(predictions: Sequence[Mapping[str, Any]], *, seed: int, against: str = AGAINST) -> list[Pair]:
    """A pair for each row that both arms answered differently, sides and order by a hash: they look random."""
    answers = {(row["arm"], row["id"]): (row["task"], row["answer"]) for row in predictions}
    found = []
    for (arm, id), (task, answer) in answers.items():
        other = answers.get((against, id))
        if arm == "tuned" and other is not None and other[1].strip() != answer.strip():
            pair = Pair(id, task, ("tuned", answer), (against, other[1]))
            is_swapped = hashlib.sha256(f"{seed}:{id}".encode()).digest()[0] & 1
            found.append(pair.swapped() if is_swapped else pair)
    return sorted(found, key=lambda pair: pair.key)


def page_of(shown: Sequence[Pair]) -> str:
    """sha256 of all pairs of a page."""
    return records.digest([pair.key for pair in shown])


def read(folder: Path = FOLDER) -> list[Choice]:
    """The choices in all `*.json` files of a folder; a rater may have several files. No folder, no choices.

    Raises: DataError, with file, what was found and what was expected, when a file is not what a rater saves.
    """
    found: dict[tuple[str, str], Choice] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_bytes())
        except ValueError as fault:
            raise DataError(f"{file}: no JSON ({fault}), expected what rate.html saves. Save it again.") from None
        _check(file, "the file", content, _FILE)
        if not NAME.fullmatch(content["rater"]):
            raise DataError(
                f"{file}: rater: found {content['rater']!r}, expected 1 to 60 of A-Z a-z 0-9 . _ - and none of the "
                "names people, agreement, ignored. Change it in the file."
            )
        _one_of(file, "kind", content["kind"], KINDS)
        for number, pair in enumerate(content["pairs"]):
            choice = _choice(file, f"pairs[{number}]", pair, content)
            before = found.setdefault((choice.rater, choice.key), choice)
            if before.choice != choice.choice:
                raise DataError(
                    f"{file}: pairs[{number}] of rater {choice.rater!r}: found {choice.choice!r}, but {before.file} "
                    f"says {before.choice!r} of the same pair, expected one choice. Remove one."
                )
    return list(found.values())


def _choice(file: Path, place: str, pair: Any, content: Mapping[str, Any]) -> Choice:
    optional: dict[str, type] = {"orders": list} if isinstance(pair, dict) and "orders" in pair else {}
    _check(file, place, pair, _PAIR | optional)
    _one_of(file, f"{place}.choice", pair["choice"], CHOICES)
    if not re.fullmatch("[0-9a-f]{64}", pair["key"]):
        raise DataError(f"{file}: {place}.key: found {pair['key']!r}, expected 64 hex digits. Save the file again.")
    orders = pair.get("orders")
    if orders is not None:
        if len(orders) != 2:
            raise DataError(f"{file}: {place}.orders: found {len(orders)} choices, expected one for each order, 2.")
        for each in orders:
            _one_of(file, f"{place}.orders", each, CHOICES)
    both = None if orders is None else (orders[0], orders[1])
    return Choice(content["rater"], content["kind"], pair["key"], pair["choice"], both, file)


def _check(file: Path, place: str, value: Any, fields: Mapping[str, type]) -> None:
    names = ", ".join(fields)
    if not isinstance(value, dict) or value.keys() != fields.keys():
        shown = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f"{file}: {place}: found {shown}, expected an object of {names}. Save it again with rate.html.")
    for name, kind in fields.items():
        if not isinstance(value[name], kind):
            raise DataError(
                f"{file}: {place}: {name}: found a {type(value[name]).__name__}, expected a {kind.__name__}."
            )


def _one_of(file: Path, place: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise DataError(f"{file}: {place}: found {value!r}, expected one of {', '.join(allowed)}.")


def summarise(choices: Sequence[Choice], shown: Sequence[Pair], p: Evaluate) -> Rated:
    """Who won, by rater, and how raters agree. Args: shown: `pairs` of the present predictions."""
    sides = {each.key: each for pair in shown for each in (pair, pair.swapped())}
    counted = [choice for choice in choices if choice.key in sides]
    judged: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # (kind, rater) -> row -> 1 won, 0.5 tie, 0
    for choice in counted:
        judged[choice.kind, choice.rater][sides[choice.key].id] = _outcome(choice.choice, sides[choice.key])
    task_of = {pair.id: pair.task for pair in shown}
    tasks = sorted(set(task_of.values()))
    people = [outcomes for (kind, _), outcomes in judged.items() if kind == "person"]
    groups = [("person", rater, judged[kind, rater]) for kind, rater in sorted(judged) if kind == "person"]
    groups += [("model", rater, judged[kind, rater]) for kind, rater in sorted(judged) if kind == "model"]
    if len(people) > 1:
        rows = sorted({row for outcomes in people for row in outcomes})
        mean = {row: float(np.mean([outcomes[row] for outcomes in people if row in outcomes])) for row in rows}
        groups.insert(0, ("person", TOGETHER, mean))
    scores = []
    for kind, rater, outcomes in groups:
        places = [choice.orders for choice in counted if (choice.kind, choice.rater) == (kind, rater) and choice.orders]
        bias = float(np.mean([set(orders) == {"left", "right"} for orders in places])) if places else None
        scores.append(_score(kind, rater, None, outcomes, bias, p))
        for task in tasks if len(tasks) > 1 else ():
            of_task = {row: outcome for row, outcome in outcomes.items() if task_of[row] == task}
            if of_task:
                scores.append(_score(kind, rater, task, of_task, None, p))
    agreements = [
        agreement((one, ours), (two, theirs))
        for (_, one, ours), (kind, two, theirs) in itertools.combinations(groups, 2)
        if ours.keys() & theirs.keys() and (one != TOGETHER or kind == "model")
    ]
    return Rated(scores, agreements, len(choices) - len(counted))


def _outcome(choice: str, pair: Pair) -> float:
    """1 when the tuned model was chosen, 0.5 for a tie, else 0."""
    return 0.5 if choice == "tie" else float({"left": pair.left, "right": pair.right}[choice][0] == "tuned")


def _score(
    kind: str, rater: str, task: str | None, outcomes: Mapping[str, float], bias: float | None, p: Evaluate
) -> Score:
    values = [outcomes[row] for row in sorted(outcomes)]
    rate = bootstrap.figure(bootstrap.mean, [values])
    low, high = bootstrap.interval(
        bootstrap.mean, [values], samples=p.bootstrap_samples, confidence=p.confidence, seed=p.seed
    )
    wins, losses = sum(value > 0.5 for value in values), sum(value < 0.5 for value in values)
    ties = len(values) - wins - losses
    p_value = comparison.sign_test(wins, losses)
    return Score(rater, kind, task, wins, ties, losses, rate, low, high, p_value, bias, p.confidence)


def agreement(one: tuple[str, Mapping[str, float]], two: tuple[str, Mapping[str, float]]) -> Agreement:
    """Cohen's kappa (1960) over win, tie and loss of the rows both judged. Args: name and outcome by row, of each."""
    rows = sorted(one[1].keys() & two[1].keys())
    ours, theirs = (np.sign([outcomes[row] - 0.5 for row in rows]).tolist() for outcomes in (one[1], two[1]))
    share = float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)]))
    often, seen = Counter(ours), Counter(theirs)
    chance = sum(often[value] * seen[value] for value in often) / len(rows) ** 2
    return Agreement((one[0], two[0]), len(rows), share, None if chance == 1 else (share - chance) / (1 - chance))


def metrics(rated: Rated) -> dict[str, float]:
    """Flat numbers `ratings/<rater>/<figure>`, `ratings/agreement/<rater>/<rater>/<figure>`; none without ratings."""
    found: dict[str, float] = {"ratings/ignored": rated.ignored} if rated.ignored else {}
    for score in rated.scores:
        if score.task is None:
            key = f"ratings/{score.rater}"
            found |= {f"{key}/win_rate": score.win_rate, f"{key}/low": score.low, f"{key}/high": score.high}
            found |= {f"{key}/n": score.n, f"{key}/p_value": score.p_value}
            if score.same_place is not None:
                found[f"{key}/same_place"] = score.same_place
    for each in rated.agreements:
        key = "ratings/agreement/" + "/".join(each.raters)
        found |= {f"{key}/n": each.n, f"{key}/share": each.share}
        if each.kappa is not None:
            found[f"{key}/kappa"] = each.kappa
    return found
