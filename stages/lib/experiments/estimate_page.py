"""Estimates as text for a terminal, and as docs/estimates.md: models of 1B to 70B on common cards, by the same code."""

import functools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from stages.lib import cost, estimate, files, numerics, tracking
from stages.lib.estimate import GIB, Range
from stages.lib.experiments import devices, shapes
from stages.lib.experiments.devices import Device
from stages.lib.experiments.foreseeing import Data, Foreseen, Params
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Numerics, Quantization
from stages.lib.schema.numerics import Device as Kind
from stages.lib.schema.train import Optimizer, Scheduler, Train


def text(p: Params, found: Foreseen, data: Data, device: Device, *, price: float | None) -> str:
    """What a person reads before a run."""
    plan, total = found.plan, found.memory.total()
    lines = [
        f"{p.base_model.id} on {device.name}",
        f"trains      {found.trainable:,} of {found.parameters:,} parameters",
        f"tokens      {plan.tokens:,}, of them {plan.labelled:,} labelled ({data.known_by})",
        f"steps       {plan.steps:,}, evaluations {plan.evaluations}",
        f"memory      {estimate.in_gib(total)}, {found.verdict(device)}: there are {device.memory / GIB:.1f} GiB",
    ]
    lines += [f"  {name:<12}{estimate.in_gib(size)}" for name, size in found.memory.parts().items() if size.high]
    spent = found.seconds
    lines.append(f"time        {span(spent.expected)} ({span(spent.low)} to {span(spent.high)}), training alone")
    lines.append(f"            bare products: {device.limit / 1e12:.3g} TFLOP/s ({device.source})")
    if price is not None:
        lines.append("cost        {1:.2f} ({0:.2f} to {2:.2f})".format(*(s / 3600 * price for s in ordered(spent))))
    return "\n".join(lines)


def ordered(found: Range) -> tuple[float, float, float]:
    return found.low, found.expected, found.high


def span(seconds: float) -> str:
    """6 s, 2 min 14 s, 3 h 20 min, 2.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds) % 60} s"
    return f"{int(minutes // 60)} h {int(minutes) % 60} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"


def stages(reasons: Mapping[str, str]) -> str:
    """The stages that would run, and why."""
    if not reasons:
        return "stages      none would run: everything is up to date"
    lines = [f"  {name:<16}{reason}" for name, reason in reasons.items()]
    return "\n".join(["stages      that would run (DVC's run cache may have some):", *lines])


def record(folder: Path, params: Mapping[str, Any]) -> str:
    """How far earlier estimates were off on this machine; empty where none was recorded.

    Args: folder: runs/.
    """
    lines = []
    own = folder / tracking.key(params) / "qlora_train.json"
    if own.exists():
        last = files.read_json(own)
        lines.append(
            f"measured    these parameters: {span(last['train/seconds'])}, {last['train/peak_memory_mib']} MiB"
        )
    found = [files.read_json(path) for path in sorted(folder.glob("*/qlora_train.json"))]
    for part in ("memory", "seconds"):
        if errors := [run[f"estimate/{part}_error"] for run in found if f"estimate/{part}_error" in run]:
            spread = f"{min(errors):+.0%} to {max(errors):+.0%} in {len(errors)} runs here"
            lines.append(f"error       {part} {statistics.median(errors):+.0%} (median; {spread})")
    return "\n".join(lines)


TEMPLATE = Path(__file__).with_suffix(".md.jinja")
MODELS = (
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen3-4B-Instruct-2507",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B-Instruct",
)
SHOWN = ("rtx_4060", "rtx_4070", "t4", "rtx_3090", "rtx_4090", "rtx_5090", "l40s", "a100_80gb", "h100_80gb", "h200")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LABELLED = 0.5
MILLION = 1_000_000
LORA = Lora(r=16, alpha=16, dropout=0.0, target_modules="all-linear")
TRAIN = Train(
    learning_rate=2e-4, epochs=1.0, batch_size=1, gradient_accumulation_steps=16, optimizer=Optimizer.adamw_torch_fused,
    scheduler=Scheduler.cosine, warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=0.3, neftune_alpha=0.0,
    gradient_checkpointing=True, evals_per_epoch=1, eval_steps=None, early_stopping_patience=0,
    early_stopping_threshold=0.0, samples=0, sample_tokens=32,
)  # fmt: skip
NUMERICS = Numerics(Determinism.strict, ComputeDtype.auto, ComputeDtype.auto, Kind.auto, Quantization.nf4, True)

PUBLISHED = {  # tokens a pass -> GB, seconds for 8 passes
    "Qwen/Qwen-1_8B-Chat": {1024: (6.6, 1.4), 2048: (7.8, 2.0), 8192: (15.8, 6.5)},
    "Qwen/Qwen-7B-Chat": {1024: (12.3, 3.5), 2048: (13.9, 7.0), 8192: (23.5, 22.3)},
    "Qwen/Qwen-14B-Chat": {1024: (18.9, 8.2), 2048: (19.9, 11.8), 8192: (27.9, 38.3)},
    "Qwen/Qwen-72B-Chat": {1024: (62.9, 41.4), 2048: (64.1, 59.5), 8192: (75.6, 179.8)},
}
"""QLoRA of rank 64 on one A100 of 80 GB, batch 1, GPTQ in 4 bit: the README of https://github.com/QwenLM/Qwen."""


def memory(name: str, device: Device, tokens: int, *, rank: int = LORA.r, labelled: float = LABELLED) -> Range:
    """Of a pass over so many tokens."""
    return _memory(name, devices.resolve(NUMERICS, device), tokens, rank, labelled)


@functools.cache
def _memory(name: str, resolved: numerics.Resolved, tokens: int, rank: int, labelled: float) -> Range:
    load = estimate.Load(tokens, round(labelled * tokens))
    lora = replace(LORA, r=rank)
    return estimate.memory(shapes.by_name(name), lora, TRAIN, NUMERICS, resolved, load).total()


def seconds(name: str, device: Device, tokens: int, *, rank: int = LORA.r, labelled: float = LABELLED) -> Range:
    """Of a training on so many tokens."""
    once = _seconds(name, device.kind, tokens, rank, labelled)
    return estimate.scaled(1 / device.limit, ordered(once))


@functools.cache
def _seconds(name: str, kind: str, tokens: int, rank: int, labelled: float) -> Range:
    """Where products reach one operation a second."""
    train, nothing = cost.Tokens(1, tokens, round(labelled * tokens)), cost.Tokens(0, 0, 0)
    return cost.seconds(shapes.by_name(name), replace(LORA, r=rank), TRAIN, train, nothing, device=kind, limit=1.0)


def longest(name: str, device: Device) -> int | None:
    """The most tokens of one pass, of LENGTHS, that surely fit."""
    return next((tokens for tokens in reversed(LENGTHS) if memory(name, device, tokens).high <= device.memory), None)


def table() -> str:
    """docs/estimates.md."""
    cards, a100 = [devices.CARDS[name] for name in SHOWN], devices.CARDS["a100_80gb"]
    low, expected, high = cost.SHARE["cuda"]
    template = Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True, undefined=StrictUndefined)
    return template.render(
        rank=LORA.r,
        usable=f"{devices.USABLE:.0%}",
        reached=f"{devices.REACHED:.0%}",
        share=[f"{share:.0%}" for share in (low, expected, high)],
        best=f"{expected / high:.2f}",
        worst=f"{expected / low:.1f}",
        longest=f"{LENGTHS[-1]:,}",
        shortest=LENGTHS[0],
        memory=rows(["model", "trained", "512", "2,048", "8,192"], (sizes(name, a100) for name in MODELS)),
        fits=rows(["model", *SHOWN], ([short(name), *(fits(name, card) for card in cards)] for name in MODELS)),
        minutes=rows(["model", *SHOWN], ([short(name), *(minutes(name, card) for card in cards)] for name in MODELS)),
        cards=rows(["card", "GiB", "TFLOP/s on paper", "source"], map(card_line, devices.CARDS.values())),
        against=rows(["model", "tokens", "GB", "estimated, GiB", "seconds", "estimated"], against(a100)),
    )


def rows(heads: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def short(name: str) -> str:
    return name.split("/")[1].removesuffix("-Instruct").removesuffix("-Instruct-2507")


def sizes(name: str, device: Device) -> list[str]:
    trained = estimate.trainable_parameters(shapes.by_name(name), LORA)
    found = [memory(name, device, tokens) for tokens in (512, 2048, 8192)]
    shown = ["{1:.1f} ({0:.1f} to {2:.1f})".format(*(size / GIB for size in ordered(one))) for one in found]
    return [short(name), f"{trained / MILLION:.1f} M", *shown]


def fits(name: str, device: Device) -> str:
    if tokens := longest(name, device):
        return f"{tokens:,}"
    return "?" if memory(name, device, LENGTHS[0]).expected <= device.memory else "-"


def minutes(name: str, device: Device) -> str:
    if fits(name, device) == "-":
        return "-"
    found = seconds(name, device, MILLION).expected / 60
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


def card_line(device: Device) -> list[str]:
    paper = device.limit / devices.REACHED / 1e12
    return [device.name, f"{device.memory / devices.USABLE / GIB:.0f}", f"{paper:.4g}", device.source]


def against(device: Device) -> Iterable[list[str]]:
    """What was published of QLoRA on an A100 beside what this code says."""
    for name, measured in PUBLISHED.items():
        for tokens, (gigabytes, spent) in measured.items():
            size = memory(name, device, tokens, rank=64, labelled=1.0)
            took = seconds(name, device, 8 * tokens, rank=64, labelled=1.0)
            yield [
                short(name).removesuffix("-Chat"), f"{tokens:,}", f"{gigabytes}",
                "{1:.1f} ({0:.1f} to {2:.1f})".format(*(s / GIB for s in ordered(size))),
                f"{spent}", "{1:.1f} ({0:.1f} to {2:.1f})".format(*ordered(took)),
            ]  # fmt: skip
