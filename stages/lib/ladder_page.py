"""The page of the fidelity ladder: table and picture, with the speeds and memory of this machine's own run."""

from collections.abc import Mapping, Sequence

from stages.lib import page
from stages.lib.evaluation_page import figure
from stages.lib.export import ladder

ARMS = ("base", "fewshot", "tuned")  # whose speeds evaluate measured


def render(metrics: Mapping[str, float], measured: Mapping[str, float], *, name: str, percent: str) -> str:
    """The page as HTML.

    Args: metrics: of quantize_export. measured: of evaluate and quantize_export on this machine, by metric name; empty
        where they did not run here. name: of the base model.
    """
    found = ladder.rungs(metrics)
    speeds = {rung.name: _measured(measured, rung.name, "tokens_per_second") for rung in found}
    memory = {rung.name: _measured(measured, rung.name, "peak_mib") for rung in found}
    return page.fill(
        "ladder_page.html.jinja",
        name=name,
        percent=percent,
        rungs=found,
        tasks=ladder.tasks(found),
        pictures=ladder.pictures(found),
        style=ladder.STYLE,
        signed=ladder.signed,
        figure=figure,
        speeds=speeds,
        memory=memory,
        skipped=int(metrics["export/skipped"]),
        missing=_missing(found, speeds, memory),
    )


def _measured(measured: Mapping[str, float], rung: str, what: str) -> float | None:
    """Of what is no export, speeds are those of evaluate, many answers at a time."""
    return measured.get(f"{ladder.prefix(rung)}/{what}", measured.get(f"evaluate/{rung}/{what}"))


def _missing(
    found: Sequence[ladder.Rung], speeds: Mapping[str, float | None], memory: Mapping[str, float | None]
) -> list[str]:
    """What the table has no figure for, in words."""
    gaps = []
    if not any(speeds.values()):
        gaps.append("No speeds and memory: neither evaluate nor quantize_export ran on this machine as it is now.")
    else:
        for what, values in (("speed", speeds), ("memory", memory)):
            if without := [rung.label for rung in found if values[rung.name] is None]:
                gaps.append(f"No {what} of {', '.join(without)}.")
    if without := [rung.label for rung in found if not rung.scores and rung.name != "tuned"]:
        gaps.append(f"No task score of {', '.join(without)}.")
    if without := [rung.label for rung in found if "kl/mean" not in rung.figures]:
        gaps.append(f"No divergence of {', '.join(without)}.")
    return gaps
