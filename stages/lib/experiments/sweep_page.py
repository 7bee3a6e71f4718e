"""The page about a sweep: what it answers, all settings, what matters, cost, noise, and what has failed.

Pictures are SVG whose places are percentages, so that they fit any width; equal results give equal bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.lib import page
from stages.lib.evaluation_page import MEANINGS, NAMES, brief, figure, p_value, signed
from stages.lib.experiments import uncertainty
from stages.lib.experiments.analysis import Analysis, Row
from stages.lib.experiments.effects import Effect, Factor
from stages.lib.experiments.results import Counts
from stages.lib.experiments.uncertainty import Interval

REASON = 160  # characters of why a point failed
MOST = 10_000  # seeds or rows that are worth counting


@dataclass(frozen=True)
class Scale:
    """Numbers as percentages of a width or height; ticks at short numbers. is_log: equal distances are equal ratios."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, is_log: bool = False) -> "Scale":
        listed = list(values)
        low, high = min(listed), max(listed)
        if is_log:
            return cls(low / 1.15, high * 1.15, True)
        room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return cls(low - room, high + room)

    def place(self, value: float) -> float:
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return round(100 * (value - low) / (high - low), 2)

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """Text and place of a few short numbers."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + k / 10 for k in range(90))):
                found = [step * 10.0**power for power in powers for step in steps]
                inside = [each for each in found if self.low <= each <= self.high]
                if len(inside) >= 3:
                    break
            every = max(1, math.ceil(len(inside) / 6))
            return [(amount(each), self.place(each)) for each in inside[::every]]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
        found = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(f"{each:.6g}".replace("-", "\N{MINUS SIGN}"), self.place(each)) for each in found]


def render(
    analyses: Sequence[Analysis], counts: Counts, *, sweep_id: str, notes: Sequence[str] = (), model: str
) -> str:
    """The page as HTML.

    Args: analyses: by the chosen measure first, then by others. notes: what a reader must know, one sentence each.
    """
    a = analyses[0]
    scale = Scale.over([end for row in a.rows for end in (row.figure.low, row.figure.high, *row.by_seed.values())])
    return page.fill(
        "experiments/sweep_page.html.jinja",
        a=a,
        others=analyses[1:],
        counts=counts,
        sweep_id=sweep_id,
        model=model,
        notes=[*notes, *warnings(a)],
        headline=headline(a),
        answers=answers(a),
        name=measure_name,
        title=lambda each: _upper(measure_name(each)),
        number=number,
        meaning=MEANINGS[a.measure.name],
        percent=f"{100 * a.p.confidence:g}%",
        figure=figure,
        signed=signed,
        p_value=p_value,
        amount=amount,
        label=label,
        level=level,
        short=short,
        scale=scale,
        cost=cost_picture(a),
        scaling=scaling_picture(a),
        bounds=Scale.over(
            [0.0, *(end for each in a.effects for change in each.changes for end in _ends(change.difference))]
        )
        if a.effects
        else None,
        kind=kind,
        seconds=_seconds(a.rows),
        shares_add_up=shares_add_up(a),
        reason=lambda text: text if len(text) <= REASON else text[: REASON - 1] + "\N{HORIZONTAL ELLIPSIS}",
    )


def _ends(difference: Interval) -> tuple[float, float]:
    return difference.low, difference.high


def headline(a: Analysis) -> str:
    """The best, how many may be it, and which to take, in one sentence."""
    best, chosen, among = a.best, a.recommended, a.among
    words = f"Best on {measure_name(a)}: {label(best.values)}, {brief(best.figure.value)}"
    if len(a.rows) == 1:
        return f"One setting only: {measure_name(a)} {brief(best.figure.value)}."
    if len(among) == 1:
        return f"{words}; every other of {len(a.rows)} settings is told to be worse."
    words += f"; {len(among) - 1} of the other {len(a.rows) - 1} cannot be told from it"
    if chosen is best:
        return f"{words}, and none of them is cheaper."
    at_most = max(abs(end) for end in _ends(chosen.behind))
    return (
        f"{words}. The cheapest of them: {label(chosen.values)}, {brief(chosen.figure.value)}, at most "
        f"{brief(at_most)} worse, for {_share(chosen.cost.flop / best.cost.flop)} of the work and "
        f"{_share(chosen.cost.trainable / best.cost.trainable)} of the trained weights."
    )


def answers(a: Analysis) -> list[str]:
    """What matters and what does not, a sentence each: told differences, bounds of the others, which is larger."""
    found = []
    for effect in a.effects:
        name = short(effect.factor)
        if not effect.is_estimable:
            found.append(f"{name}: these points cannot tell it from the other keys.")
            continue
        change = effect.largest
        if effect.factor.is_slope:
            found.append(f"{name}: {_interval(change.difference)} per doubling.")
        elif effect.is_told:
            better, worse = _order(a, effect)
            size = Interval(*sorted_by_sign(change.difference))
            found.append(f"{name} matters: {better} is better than {worse} by {_interval(size, sign=False)}.")
        else:
            found.append(
                f"{name}: no difference is told between {_list([level(each) for each in effect.factor.levels])}; "
                f"if there is one, it is at most {figure(effect.bound)}."
            )
    larger: dict[Factor, list[str]] = {}
    for one, other in a.more:
        larger.setdefault(one, []).append(short(other))
    found += [f"{short(one)} matters more than {_list(others)}." for one, others in larger.items()]
    told = [each for each in a.interplay if each.p_value <= 1 - a.p.confidence]
    found += [
        f"What {short(each.one)} does depends on {short(each.other)} ({_share(each.share)} of the variance between "
        f"settings, p {p_value(each.p_value)}): read their averages with the list of settings."
        for each in told
    ]
    if (chosen := a.recommended).needed:
        seeds = f"{number(chosen.needed.seeds)} seeds of each" if a.has_seeds else "more seeds"
        found.append(
            f"To tell the recommended setting from the best, if their difference is the one seen: {seeds}, or "
            f"{number(chosen.needed.rows)} test rows."
        )
    return found


def _order(a: Analysis, effect: Effect) -> tuple[str, str]:
    """The better and the worse level of the largest difference."""
    change = effect.largest
    is_rising = (change.difference.value > 0) == a.measure.higher_is_better
    levels = level(change.low_level), level(change.high_level)
    return (levels[1], levels[0]) if is_rising else levels


def sorted_by_sign(difference: Interval) -> tuple[float, float, float]:
    """A difference as its size."""
    if difference.value >= 0:
        return difference.value, difference.low, difference.high
    return -difference.value, -difference.high, -difference.low


def warnings(a: Analysis) -> list[str]:
    """What limits the conclusions."""
    found = []
    if not a.has_seeds:
        found.append(
            "Every setting was trained once. How much another seed would change is not known: what is told here holds "
            "for these trainings, not for their settings. Add `seed: [42, 43, 44]` to the grid."
        )
    elif (unequal := sorted({len(row.by_seed) for row in a.rows})) != [max(unequal)]:
        found.append(
            f"Settings have from {unequal[0]} to {unequal[-1]} seeds; the noise of seeds is that of all together."
        )
    by_seed = {label(row.values): list(row.by_seed.values()) for row in a.rows}
    if uncertainty.equal_noise(list(by_seed.values())) < 1 - a.p.confidence:
        widest = max(by_seed, key=lambda name: float(np.std(by_seed[name])))
        found.append(
            f"Settings differ in their noise of seeds, most is that of {widest}; here all have the same. Averages over "
            "settings bear that, comparisons of single settings less."
        )
    by_rank = {row.setting.values["lora.r"]: step(row.setting.values) for row in a.rows}
    low, high = min(by_rank), max(by_rank)
    if not 2 / 3 < (times := by_rank[high] / by_rank[low]) < 3 / 2:
        found.append(
            f"At one learning rate an optimizer step moves the model about {times:.2g} times as far at rank {high} as "
            f"at rank {low} (scaling times the root of r). The effect of rank includes that of the step. With "
            "lora=rslora, lora.alpha left alone, steps are alike at every rank."
        )
    return found


def step(values: Mapping[str, Any]) -> float:
    """How far an optimizer step moves what an adapter adds, at one learning rate, up to a factor: scaling x root of r.

    Adam moves each weight of B by the learning rate; A's rows are drawn at random, so that r of them add up as sqrt(r).
    Source: rank-stabilised LoRA, https://arxiv.org/abs/2312.03732.
    """
    r, alpha = values["lora.r"], values["lora.alpha"]
    return float(alpha * math.sqrt(r) / {"fixed": r, "ratio": 1, "rslora": math.sqrt(r)}[values["lora.alpha_mode"]])


def shares_add_up(a: Analysis) -> bool:
    """Whether factors share the variance between settings without overlap, as in a full grid."""
    together = sum(each.share for each in a.effects) + sum(each.share for each in a.interplay)
    return len(a.effects) > 1 and together <= 1.001


@dataclass(frozen=True)
class Dot:
    """A setting in a picture, places in percent."""

    x: float
    y: float
    low: float
    high: float
    kind: str
    text: str


@dataclass(frozen=True)
class Picture:
    """Settings over an amount, with both axes."""

    x_name: str
    x: Scale
    y: Scale
    dots: Sequence[Dot]


def cost_picture(a: Analysis) -> Picture | None:
    """Figures over work, or over trained weights where the work is the same within a third; None of one setting."""
    if len(a.rows) < 2:
        return None
    work = [row.cost.flop for row in a.rows]
    is_work = max(work) / min(work) > 1.33
    x_name = "Floating-point operations of one training" if is_work else "Trained weights"
    return _picture(a, x_name, [row.cost.flop if is_work else row.cost.trainable for row in a.rows])


def scaling_picture(a: Analysis) -> Picture | None:
    """Figures over training rows, where their number varied."""
    amounts = [row.setting.rows for row in a.rows]
    return _picture(a, "Training rows", amounts) if len(set(amounts)) > 1 else None


def _picture(a: Analysis, x_name: str, amounts: Sequence[float]) -> Picture:
    x = Scale.over(amounts, is_log=True)
    y = Scale.over([end for row in a.rows for end in (row.figure.low, row.figure.high)])
    dots = [
        Dot(
            x.place(each),
            100 - y.place(row.figure.value),
            100 - y.place(row.figure.low),
            100 - y.place(row.figure.high),
            kind(row),
            f"{label(row.values)}: {figure(row.figure.value)} [{figure(row.figure.low)}, {figure(row.figure.high)}]",
        )
        for row, each in zip(a.rows, amounts, strict=True)
    ]
    return Picture(x_name, x, y, sorted(dots, key=lambda dot: dot.kind == "chosen"))


def kind(row: Row) -> str:
    return "chosen" if row.is_recommended else "among" if row.is_among else "out"


def _seconds(rows: Sequence[Row]) -> float | None:
    """Seconds of all trainings and evaluations; None where some are not known."""
    known = [row.cost.seconds * len(row.by_seed) for row in rows if row.cost.seconds is not None]
    return sum(known) if len(known) == len(rows) else None


def measure_name(a: Analysis) -> str:
    """field F1 of parameters."""
    name = NAMES[a.measure.name]
    return f"{name if name[1:2].isupper() or name == 'chrF' else name[0].lower() + name[1:]} of {a.measure.task}"


def label(values: Mapping[str, Any]) -> str:
    """r 8, all-linear, learning_rate 0.001: words speak for themselves, numbers need their key."""
    parts = [
        text if isinstance(value, str) else f"{key.split('.')[-1]} {text}"
        for key, value in values.items()
        if (text := level(value))
    ]
    return ", ".join(parts) or "the only setting"


def level(value: Any) -> str:
    """A value as it is read."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return "+".join(map(level, value)) if isinstance(value, (list, tuple)) else str(value)


def short(factor: Factor) -> str:
    """A factor's key, with those that changed along."""
    return factor.name if len(factor.keys) == 1 else f"{factor.name} (with {', '.join(factor.keys[1:])})"


def amount(value: float) -> str:
    """1.2 k, 340 M, 16 T: for sizes and work."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g}"


def number(value: int | None) -> str:
    """How many seeds or rows are needed, no more exactly than that can be known."""
    return "no number of" if value is None else f"{value:,}" if value <= MOST else f"over {MOST:,}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _share(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.005 else f"{100 * value:.1g}%"


def _interval(found: Interval, *, sign: bool = True) -> str:
    value, low, high = (signed(end) if sign or end < 0 else figure(end) for end in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _list(words: Sequence[str]) -> str:
    return " and ".join(([", ".join(words[:-1])] if words[1:] else []) + [words[-1]])
