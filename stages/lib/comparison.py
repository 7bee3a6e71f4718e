"""Arms compared on one set of rows: a figure per arm and measure, how sure the differences are, and for which rows.

Everything here is a function of tables of predictions: those of one run, or of any two that were kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest

from stages.lib import bootstrap
from stages.lib.errors import DataError
from stages.lib.measures import SCORES
from stages.lib.schema.evaluate import Evaluate

PREDICTIONS = pa.schema(
    [
        ("arm", pa.string()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),
        ("length", pa.string()),
        ("prompt_sha", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("n_tokens", pa.int32()),
        ("n_bytes", pa.int32()),
        ("nll", pa.float64()),
        ("new_tokens", pa.int32()),
        ("stops", pa.float64()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        *((name, pa.float64()) for name in SCORES),
    ]
)
"""One row per arm and test row, sorted by arm and id; what does not apply to the task is null.

length: short, middle or long, by thirds of the task's prompts in tokens. language: of the user's words, where it is
clear. n_tokens, n_bytes: of the reference, with and without its end of turn. label: the reference's, of a task that is
a classification; predicted: the arm's. stops, new_tokens: null where nothing was generated.
"""

TUNED = "tuned"
BASELINES = ("base", "fewshot")  # the order of a comparison; other arms follow by name
LIKELIHOOD = ("loss", "perplexity", "bits_per_byte")  # one comparison in three units
LOWER_IS_BETTER = LIKELIHOOD
SLICED_BY = ("length", "source", "language")
MIN_SLICE = 10  # rows; of fewer a difference says too little to be shown

Prediction = Mapping[str, Any]
COMPARED_TABLE = ("task", "measure", "arm", "rows", "value", "low", "high")
DIFFERENCE_TABLE = (
    "delta_rows",
    "delta",
    "delta_low",
    "delta_high",
    "rows_up",
    "rows_down",
    "p_value",
    "p_adjusted",
    "verdict",
)


@dataclass(frozen=True)
class Difference:
    """Tuned minus one baseline on the rows that both answered.

    low, high: percentile interval of the paired bootstrap. up, down: rows on which tuned's number is the higher or the
    lower one. p_value: exact two-sided sign test on them. p_adjusted: by Holm, over all that was compared with it.
    """

    delta: float
    low: float
    high: float
    n: int
    up: int
    down: int
    p_value: float
    p_adjusted: float = 1.0
    confidence: float = 0.95

    def verdict(self, *, higher_is_better: bool) -> str:
        """`better`, `worse`, or `cannot tell`.

        A difference is told when the interval excludes zero, and the sign test, corrected, finds most rows on its side.
        """
        is_told = not self.low <= 0 <= self.high and self.p_adjusted <= 1 - self.confidence
        if not is_told or (self.low > 0) != (self.up > self.down):
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Line:
    """One measure on one task: each arm's figure, its interval and number of rows; tuned minus each other arm."""

    task: str
    measure: str
    arms: dict[str, float]
    against: dict[str, Difference]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        return self.measure not in LOWER_IS_BETTER

    def verdict(self, baseline: str) -> str:
        return self.against[baseline].verdict(higher_is_better=self.higher_is_better)


@dataclass(frozen=True)
class Slice(Line):
    """A line on the rows of a task with one value of length, source or language; `against` is empty where too small."""

    by: str = ""
    value: str = ""

    @property
    def is_too_small(self) -> bool:
        return max(self.n.values()) < MIN_SLICE


@dataclass(frozen=True)
class _Measure:
    """How a measure is computed: its statistic, the columns of that, and a row's number for the sign test."""

    statistic: bootstrap.Statistic
    columns: Callable[[Prediction], tuple[float, ...]]
    sign: Callable[[Prediction], float]


def compare(
    predictions: Sequence[Prediction], p: Evaluate, *, ours: str = TUNED, measures: Sequence[str] | None = None
) -> list[Line]:
    """Every measure, or those named, of every task, tasks in alphabetical order, measures in the order of the columns.

    Loss is nll per token over all tokens of the task, perplexity its exponential, bits per byte nll over the bytes of
    the references; macro F1 of classifications is over labels; the rest are means over rows. An arm that answered some
    rows only is compared on these. The sign tests of all lines are corrected together.

    Args: predictions: rows as in PREDICTIONS, each id once per arm. ours: the arm that is compared with all others.
    """
    lines = [
        _line(Line, task, measure, by_arm, p, ours)
        for task, by_arm in _by_task(predictions).items()
        for measure in measures or _measures(by_arm[ours].values())
    ]
    return _corrected(lines)


def between(ours: Sequence[Prediction], theirs: Sequence[Prediction], p: Evaluate, *, arm: str = TUNED) -> list[Line]:
    """One arm of two tables of predictions, of any two experiments, on the rows both have: lines of `ours`, `theirs`.

    Raises: DataError, when they share no row.
    """
    named: list[Prediction] = [
        {**row, "arm": name} for name, rows in (("ours", ours), ("theirs", theirs)) for row in rows if row["arm"] == arm
    ]
    asked = {name: {(row["task"], row["id"]) for row in named if row["arm"] == name} for name in ("ours", "theirs")}
    shared = asked["ours"] & asked["theirs"]
    if not shared:
        counts = " and ".join(str(len(rows)) for rows in asked.values())
        raise DataError(
            f"predictions of {arm!r}: {counts} rows, none of them the same, expected experiments with common test "
            "rows: the same data, split.seed and split fractions."
        )
    return compare([row for row in named if (row["task"], row["id"]) in shared], p, ours="ours")


def slices(predictions: Sequence[Prediction], p: Evaluate) -> list[Slice]:
    """The loss and the main measure of each task by prompt length, source and language, where there are several values.

    Corrected among themselves: what slices show is for looking closer, and takes nothing from the lines' verdicts.
    """
    found: list[Slice] = []
    for task, by_arm in _by_task(predictions).items():
        possible = _measures(by_arm[TUNED].values())
        for by in SLICED_BY:
            values = sorted({row[by] for row in by_arm[TUNED].values() if row[by] is not None}, key=_slice_order)
            for value in values if len(values) > 1 else ():
                inside = {
                    arm: {id: row for id, row in rows.items() if row[by] == value} for arm, rows in by_arm.items()
                }
                inside = {arm: rows for arm, rows in inside.items() if rows}
                for measure in ("loss", main_of(possible)):
                    made = _line(Slice, task, measure, inside, p, TUNED, min_rows=MIN_SLICE)
                    found.append(replace(made, by=by, value=value))
    return _corrected(found)


def _slice_order(value: str) -> tuple[int, str]:
    sizes = ("short", "middle", "long")
    return (sizes.index(value) if value in sizes else len(sizes)), value


def _by_task(predictions: Sequence[Prediction]) -> dict[str, dict[str, dict[str, Prediction]]]:
    """task -> arm -> id -> row, each in a fixed order: tasks by name, baselines, other arms by name, tuned; ids."""
    found: dict[str, dict[str, dict[str, Prediction]]] = {}
    for row in sorted(predictions, key=lambda row: (row["task"], *_arm_order(row["arm"]), row["id"])):
        rows = found.setdefault(row["task"], {}).setdefault(row["arm"], {})
        assert row["id"] not in rows
        rows[row["id"]] = row
    return found


def _arm_order(arm: str) -> tuple[int, str]:
    return (BASELINES.index(arm) if arm in BASELINES else len(BASELINES) + (arm == TUNED)), arm


def _measures(rows: Iterable[Prediction]) -> list[str]:
    """What a task is measured by, in the order it is reported."""
    first = next(iter(rows))
    scores = [name for name in (*SCORES, "stops") if first[name] is not None]
    is_labelled = first["label"] is not None and first["predicted"] is not None
    return [*LIKELIHOOD, *(["macro_f1"] if is_labelled else []), *scores]


def _measure(name: str, rows: Iterable[Prediction]) -> _Measure:
    if name == "loss":
        return _Measure(bootstrap.ratio, lambda row: (row["nll"], row["n_tokens"]), _nats_per_token)
    if name == "perplexity":
        return _Measure(
            lambda nll, tokens: np.exp(bootstrap.ratio(nll, tokens)),
            lambda row: (row["nll"], row["n_tokens"]),
            _nats_per_token,
        )
    if name == "bits_per_byte":
        return _Measure(
            lambda nll, size: bootstrap.ratio(nll, size) / np.log(2),
            lambda row: (row["nll"], max(1, row["n_bytes"])),
            _nats_per_token,
        )
    if name == "macro_f1":
        codes = {label: code for code, label in enumerate(sorted({row[k] for row in rows for k in _LABELS}))}
        return _Measure(
            bootstrap.macro_f1,
            lambda row: (codes[row["label"]], codes[row["predicted"]]),
            lambda row: float(row["label"] == row["predicted"]),
        )
    return _Measure(bootstrap.mean, lambda row: (row[name],), lambda row: float(row[name]))


_LABELS = ("label", "predicted")


def _nats_per_token(row: Prediction) -> float:
    return float(row["nll"] / row["n_tokens"])


def _line(
    kind: type[Any],
    task: str,
    measure: str,
    by_arm: Mapping[str, Mapping[str, Prediction]],
    p: Evaluate,
    ours: str,
    *,
    min_rows: int = 1,
) -> Any:
    """A Line or a Slice without its corrected p-values. The same seed for every measure: all see the same draws."""
    how = _measure(measure, [row for rows in by_arm.values() for row in rows.values()])
    settings: dict[str, Any] = {"samples": p.bootstrap_samples, "confidence": p.confidence, "seed": p.seed}
    columns = {arm: _columns(how, rows.values()) for arm, rows in by_arm.items()}
    against = {}
    for arm, theirs in by_arm.items():
        ids = [id for id in by_arm[ours] if id in theirs]
        if arm == ours or len(ids) < min_rows:
            continue
        a, b = ([rows[id] for id in ids] for rows in (by_arm[ours], theirs))
        found = bootstrap.paired(how.statistic, _columns(how, a), _columns(how, b), **settings)
        signs = [how.sign(x) - how.sign(y) for x, y in zip(a, b, strict=True)]
        up, down = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
        against[arm] = Difference(
            found.delta, found.low, found.high, len(ids), up, down, sign_test(up, down), confidence=p.confidence
        )
    return kind(
        task=task,
        measure=measure,
        arms={arm: bootstrap.figure(how.statistic, columns[arm]) for arm in by_arm},
        against=against,
        intervals={arm: bootstrap.interval(how.statistic, columns[arm], **settings) for arm in by_arm},
        n={arm: len(rows) for arm, rows in by_arm.items()},
    )


def _columns(how: _Measure, rows: Iterable[Prediction]) -> list[tuple[float, ...]]:
    return list(zip(*(how.columns(row) for row in rows), strict=True))


@cache
def sign_test(up: int, down: int) -> float:
    """Two-sided p-value of that many rows on either side when both sides are equally likely; ties say nothing."""
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that the chance of one false find among them all stays below each.

    [0.01, 0.04, 0.03]  ->  [0.03, 0.06, 0.06]   (the smallest times 3, the next times 2, never below one before it)
    Source: Holm (1979), https://www.jstor.org/stable/4615733
    """
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _corrected(lines: Sequence[Any]) -> list[Any]:
    """The lines with Holm's correction over all their differences; those of the likelihood are one comparison."""

    def name(line: Line, arm: str) -> tuple[Any, ...]:
        place = (line.by, line.value) if isinstance(line, Slice) else ()
        return (line.task, *place, LIKELIHOOD[0] if line.measure in LIKELIHOOD else line.measure, arm)

    p_values = {name(line, arm): found.p_value for line in lines for arm, found in line.against.items()}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        replace(
            line,
            against={arm: replace(found, p_adjusted=adjusted[name(line, arm)]) for arm, found in line.against.items()},
        )
        for line in lines
    ]


def metrics(lines: Sequence[Line]) -> dict[str, float]:
    """Flat numbers `test/<task>/<measure>/<figure>`; delta, low, high are tuned minus base unless named otherwise."""
    found: dict[str, float] = {}
    for line in lines:
        key = f"test/{line.task}/{line.measure}"
        found |= {f"{key}/{arm}": value for arm, value in line.arms.items()}
        for baseline, difference in line.against.items():
            ending = "" if baseline == "base" else f"_{baseline}"
            found |= {
                f"{key}/delta{ending}": difference.delta,
                f"{key}/low{ending}": difference.low,
                f"{key}/high{ending}": difference.high,
            }
    return found


def table(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """All that was compared, one row per line and arm, for a CSV file; slices with `by` and `value`."""
    rows = []
    for line in lines:
        place = {"by": line.by, "slice": line.value} if isinstance(line, Slice) else {}
        for arm, value in line.arms.items():
            found = line.against.get(arm)
            told: tuple[Any, ...] = ("",) * len(DIFFERENCE_TABLE)
            if found is not None:
                told = (found.n, found.delta, found.low, found.high, found.up, found.down, found.p_value)
                told += (found.p_adjusted, line.verdict(arm))
            figures = (line.task, line.measure, arm, line.n[arm], value, *line.intervals[arm])
            rows.append(
                place | dict(zip(COMPARED_TABLE, figures, strict=True)) | dict(zip(DIFFERENCE_TABLE, told, strict=True))
            )
    return rows


def main_of(measures: Sequence[str]) -> str:
    """The measure a task is judged by: accuracy of a classification, field F1 where answers are JSON, else ROUGE-L."""
    return next(name for name in ("accuracy", "field_f1", "rouge_l") if name in measures)


def main_measure(lines: Sequence[Line], task: str) -> Line:
    """The line a task is judged by."""
    of_task = {line.measure: line for line in lines if line.task == task}
    return of_task[main_of(list(of_task))]
