"""The fidelity ladder: from the base to each exported file, what is left of the trained model and what it takes.

Every figure compares with one model, the 4-bit base with its adapter, which was evaluated. Table and picture are
functions of metrics/quantize_export.json.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.bootstrap import Difference
from stages.lib.schema.export import Format

LABELS = {
    "base": "base",
    "fewshot": "base, with examples",
    "tuned": "base + adapter",
    "merged": "merged",
}
FIGURES = ("mib", "bits_per_weight", "perplexity_ratio", "kl/mean", "kl/p99", "top1")


@dataclass(frozen=True)
class Rung:
    """One step. figures: of FIGURES those that were measured. scores: `task/measure` -> minus tuned, same rows."""

    name: str
    figures: Mapping[str, float]
    scores: Mapping[str, Difference]

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)


def prefix(name: str) -> str:
    """Where the metrics of a rung stand: `ladder/<name>` of what is not exported, `export/<format>`."""
    return f"ladder/{name}" if name in LABELS else f"export/{name}"


def rungs(metrics: Mapping[str, float]) -> list[Rung]:
    """The rungs that were measured, in order: base, with examples, tuned, merged, formats."""
    found = []
    for name in (*LABELS, *map(str, Format)):
        inside = {
            key.removeprefix(f"{prefix(name)}/"): value
            for key, value in metrics.items()
            if key.startswith(f"{prefix(name)}/")
        }
        stems = [key.removesuffix("/delta") for key in inside if key.endswith("/delta")]
        scores = {
            stem.removeprefix("task/"): Difference(*(inside[f"{stem}/{end}"] for end in ("delta", "low", "high")))
            for stem in sorted(stems)
        }
        if inside:
            found.append(Rung(name, {key: inside[key] for key in FIGURES if key in inside}, scores))
    return found


def tasks(found: Sequence[Rung]) -> list[str]:
    """Every `task/measure` that some rung has."""
    return sorted({task for rung in found for task in rung.scores})


def table(found: Sequence[Rung]) -> list[dict[str, Any]]:
    """Rows of plots/ladder.csv; what was not measured is empty."""
    return [
        {"rung": rung.name}
        | {key.replace("/", "_"): rung.figures.get(key, "") for key in FIGURES}
        | {
            f"{task}{ending}": getattr(rung.scores[task], end) if task in rung.scores else ""
            for task in tasks(found)
            for ending, end in (("", "delta"), ("/low", "low"), ("/high", "high"))
        }
        for rung in found
    ]


ROW, TOP, BOTTOM, WIDTH, NAMES = 38, 56, 26, 170, 150
"""Heights of a row, of the panels' titles and of their scales; widths of a panel and of the names beside it."""
STYLE = (
    ".t{font:600 12px system-ui,sans-serif;fill:var(--ink,#1b1f24)}"
    ".s{font:11px system-ui,sans-serif;fill:var(--soft,#5b6470);"
    "paint-order:stroke;stroke:var(--card,#fff);stroke-width:3px}"
    ".n{font:12.5px system-ui,sans-serif;fill:var(--ink,#1b1f24)}"
    ".g{stroke:var(--line,#e3e6ea)}.z{stroke:var(--quiet,#8b93a0)}"
    ".b{fill:var(--quiet,#8b93a0)}.d{fill:var(--accent,#0f6fa8)}"
    ".r{stroke:var(--accent,#0f6fa8);stroke-width:3;stroke-linecap:round;opacity:.45}"
)


@dataclass(frozen=True)
class Mark:
    """One rung in one panel, all places from 0 to 1: a bar from 0 to `at`, or a dot on a line from low to high."""

    text: str
    at: float
    low: float
    high: float
    is_bar: bool = False


@dataclass(frozen=True)
class Panel:
    """One measure for all rungs. ticks: text and place. zero: where a line stands that means no difference."""

    title: str
    unit: str
    marks: Sequence[Mark | None]
    ticks: Sequence[tuple[str, float]]
    zero: float | None = None


def panels(found: Sequence[Rung]) -> list[Panel]:
    """Size, divergence and each task's score."""
    return [_sizes(found), _divergences(found), *(_scores(found, task) for task in tasks(found))]


def picture(found: Sequence[Rung]) -> str:
    """All panels side by side, as one SVG file that stands for itself; equal rungs give equal bytes."""
    shown = panels(found)
    width, height = NAMES + len(shown) * (WIDTH + 24), TOP + ROW * len(found) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Fidelity ladder of {len(found)} models</title><style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _names(found),
        *(_drawn(panel, NAMES + place * (WIDTH + 24)) for place, panel in enumerate(shown)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def pictures(found: Sequence[Rung]) -> list[str]:
    """Each panel as an SVG element of its own, names beside it, for a page that sets the colours and breaks lines."""
    width, height = NAMES + WIDTH + 10, TOP + ROW * len(found) + BOTTOM
    return [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(panel.title)}">'
        f"{_names(found)}{_drawn(panel, NAMES)}</svg>"
        for panel in panels(found)
    ]


def _names(found: Sequence[Rung]) -> str:
    return "".join(
        f'<text class="n" x="0" y="{TOP + ROW * place + 22}">{html.escape(rung.label)}</text>'
        for place, rung in enumerate(found)
    )


def _drawn(panel: Panel, left: int) -> str:
    bottom = TOP + ROW * len(panel.marks)
    parts = [
        f'<text class="t" x="{left}" y="14">{html.escape(panel.title)}</text>',
        f'<text class="s" x="{left}" y="30">{html.escape(panel.unit)}</text>',
    ]
    for text, at in panel.ticks:
        x = round(left + WIDTH * at, 1)
        anchor = "start" if at < 0.1 else "end" if at > 0.9 else "middle"
        parts += [
            f'<line class="g" x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{bottom}"/>',
            f'<text class="s" x="{x}" y="{bottom + 16}" text-anchor="{anchor}">{html.escape(text)}</text>',
        ]
    if panel.zero is not None:
        x = round(left + WIDTH * panel.zero, 1)
        parts.append(f'<line class="z" x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{bottom}"/>')
    for place, mark in enumerate(panel.marks):
        top = TOP + ROW * place
        if mark is None:
            parts.append(f'<text class="s" x="{left}" y="{top + 22}">not measured</text>')
            continue
        at, low, high = (round(left + WIDTH * value, 1) for value in (mark.at, mark.low, mark.high))
        parts.append(f'<text class="s" x="{left}" y="{top + 11}">{html.escape(mark.text)}</text>')
        if mark.is_bar:
            parts.append(
                f'<rect class="b" x="{left}" y="{top + 17}" width="{max(at - left, 1):.1f}" height="9" rx="2"/>'
            )
        else:
            parts += [
                f'<line class="r" x1="{low}" x2="{high}" y1="{top + 22}" y2="{top + 22}"/>',
                f'<circle class="d" cx="{at}" cy="{top + 22}" r="4.5"/>',
            ]
    return "".join(parts)


def _panel(
    found: Sequence[Rung],
    title: str,
    unit: str,
    keys: Sequence[str],
    mark: Callable[[Mapping[str, float]], Mark],
    ticks: Sequence[tuple[str, float]],
) -> Panel:
    marks = [mark(rung.figures) if all(key in rung.figures for key in keys) else None for rung in found]
    return Panel(title, unit, marks, ticks)


def _sizes(found: Sequence[Rung]) -> Panel:
    top = _ceiling(max((rung.figures["mib"] for rung in found if "mib" in rung.figures), default=1.0))

    def mark(figures: Mapping[str, float]) -> Mark:
        text = f"{figures['mib']:,.0f} MiB, {figures['bits_per_weight']:.1f} bits"
        return Mark(text, figures["mib"] / top, 0, 0, is_bar=True)

    ticks = [(f"{top * part / 2:,g}", part / 2) for part in range(3)]
    return _panel(found, "Size", "MiB, bits per weight", ("mib", "bits_per_weight"), mark, ticks)


KL_FLOOR, KL_TOP = 1e-6, 10.0  # nats per token; below float32's noise, and above what a broken model comes to


def _divergences(found: Sequence[Rung]) -> Panel:
    def place(kl: float) -> float:
        inside = min(max(kl, KL_FLOOR), KL_TOP)
        return math.log(inside / KL_FLOOR) / math.log(KL_TOP / KL_FLOOR)

    def mark(figures: Mapping[str, float]) -> Mark:
        mean, p99 = figures["kl/mean"], figures["kl/p99"]
        return Mark(f"{mean:.2g}, 99th percentile {p99:.2g}", place(mean), place(mean), place(p99))

    ticks = [(f"{10.0**power:g}", place(10.0**power)) for power in (-6, -3, 0)]
    return _panel(found, "Divergence", "mean KL from the trained model, nats", ("kl/mean", "kl/p99"), mark, ticks)


def _scores(found: Sequence[Rung], task: str) -> Panel:
    """Differences from -1 to 1 by their square roots: those of exports are small, those of the base large."""

    def place(value: float) -> float:
        return 0.5 + math.copysign(math.sqrt(min(abs(value), 1.0)), value) / 2

    def mark(rung: Rung) -> Mark | None:
        if rung.name == "tuned":
            return Mark("0, the reference", 0.5, 0.5, 0.5)
        if task not in rung.scores:
            return None
        score = rung.scores[task]
        text = f"{signed(score.delta)} ({signed(score.low)} to {signed(score.high)})"
        return Mark(text, place(score.delta), place(score.low), place(score.high))

    name, _, measure = task.rpartition("/")
    ticks = [(f"{value:+g}".replace("-", "\N{MINUS SIGN}"), place(value)) for value in (-1, -0.1, 0.1, 1)]
    return Panel(name, f"{measure}, minus tuned", [mark(rung) for rung in found], ticks, zero=0.5)


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def signed(value: float) -> str:
    """A difference with its sign, a true minus sign: +0.713; 0 as it is."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if round(value, 2) else "0"
