"""What a training will take, before it starts: from parameters, and what the last run says of the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stages.lib import cost, estimate, files, tracking
from stages.lib.errors import ConfigError
from stages.lib.estimate import Range
from stages.lib.experiments import advice, devices, kept
from stages.lib.experiments.devices import Device
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.lora import Lora, check_together
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.pack import Pack
from stages.lib.schema.train import Train, check_optimizer

OF_DATA = ("base_model", "prompt", "data", "dedup", "split", "pack")
"""Sections of parameters that decide which tokens are trained on."""

FILL = 0.97
"""Share of a pack's room that holds tokens, metrics/tokenize_pack.json: 0.97 of the default data."""


@dataclass
class Params:
    base_model: BaseModel
    pack: Pack
    lora: Lora
    train: Train
    numerics: Numerics


@dataclass(frozen=True)
class Data:
    """Tokens of both splits, and how they are known: `as packed`, or what was assumed."""

    train: cost.Tokens
    validation: cost.Tokens
    known_by: str


@dataclass(frozen=True)
class Foreseen:
    """A training on a device: what it trains, what it does, what it takes."""

    trainable: int
    parameters: int
    plan: cost.Plan
    memory: estimate.Estimate
    seconds: Range

    def verdict(self, device: Device) -> str:
        """Whether the device's memory is enough, in words."""
        total = self.memory.total()
        if total.high <= device.memory:
            return "fits"
        return "may fit" if total.expected <= device.memory else "does not fit"


def foresee(model: PreTrainedModel, p: Params, data: Data, device: Device) -> Foreseen:
    """Args: model: without weights.

    Raises: ConfigError, for sections that do not go together, or layers the base does not have.
    """
    resolved = devices.resolve(p.numerics, device)
    check_together(p.lora, p.numerics, gradient_checkpointing=p.train.gradient_checkpointing)
    check_optimizer(p.train, device.kind)
    tokens = p.train.batch_size * p.pack.max_tokens  # packs are full but for a few
    load = estimate.Load(tokens, round(tokens * data.train.share()))
    spent = cost.seconds(
        model, p.lora, p.train, data.train, data.validation, device=device.kind, limit=device.limit
    )  # fmt: skip
    return Foreseen(
        estimate.trainable_parameters(model, p.lora),
        sum(parameter.numel() for parameter in model.parameters()),
        cost.plan(data.train, p.train),
        estimate.memory(model, p.lora, p.train, p.numerics, resolved, load, room=device.memory / 4),
        spent,
    )


def data_of(params: Mapping[str, Any], *, rows: int | None = None, tokens: float | None = None) -> Data:
    """Tokens of the splits, from metrics/tokenize_pack.json where they are of these parameters.

    Where other data, another tokenizer or other lengths are asked for, its tokens a row and its share of labels are
    taken to hold; rows are as many as there were, or with another data, dedup or split those of `rows_of`.

    Args: params: nested. rows, tokens: of the training split, and mean tokens a row, where they are known better.
    Raises: ConfigError, when nothing is known.
    """
    path = Path("metrics/tokenize_pack.json")
    if not path.exists():
        raise ConfigError(f"{path}: not found, expected what the last run packed. Run `dvc repro tokenize_pack` once.")
    metrics = files.read_json(path)
    found = {split: packed(metrics, split) for split in ("train", "validation")}
    changed = [section for section in OF_DATA if section not in unchanged(params)]
    if not changed and rows is None and tokens is None:
        return Data(found["train"], found["validation"], "as packed")
    room = params["pack"]["max_tokens"]
    of_last = metrics["train/rows/packed"]
    per_row = tokens or found["train"].tokens / of_last
    is_same = not {"data", "dedup", "split"} & set(changed)
    n_rows = rows or (int(of_last) if is_same else rows_of(params, has_other_data="data" in changed))
    train = guessed(n_rows, min(per_row, room), room, found["train"].share())
    said = [f"{section} is not what was packed last" for section in changed]
    said += [f"taken to be {n_rows:,} rows of {per_row:,.0f} tokens, {train.share():.0%} of them labelled"]
    return Data(train, found["validation"], "; ".join(said))


def unchanged(params: Mapping[str, Any]) -> list[str]:
    """Of the sections that decide the tokens those that are what the last run had, by dvc.lock."""
    lock = kept.parse(Path("dvc.lock").read_text()) if Path("dvc.lock").exists() else {}
    stages = lock.get("stages", {})
    upstream = [name for name in (*tracking.upstream("tokenize_pack"), "tokenize_pack") if name in stages]
    recorded: dict[str, Any] = {}
    for name in upstream:
        recorded |= stages[name].get("params", {}).get("params.yaml", {})
    return [section for section in OF_DATA if section in recorded and recorded[section] == params[section]]


def packed(metrics: Mapping[str, float], split: str) -> cost.Tokens:
    """Of a split, from metrics of tokenize_pack."""
    names = ("packs", "tokens/in", "tokens/trained")
    return cost.Tokens(*(int(metrics[f"{split}/{name}"]) for name in names))


def rows_of(params: Mapping[str, Any], *, has_other_data: bool) -> int:
    """Rows of the training split: of each task what the last run had before caps, or what split.max_rows lets through.

    Other data may have tasks that only split.max_rows names: of these so many.
    """
    prepared, split = (files.read_json(Path(f"metrics/{stage}.json")) for stage in ("prepare", "dedup_split"))
    most = params["split"]["max_rows"].get("train", {})
    there = {task.name: task.available for task in advice.tasks(prepared, split, {})}
    if has_other_data:
        there = most | there
    return round(params["data"]["fraction"] * sum(min(n, most.get(task, n)) for task, n in there.items()))


def guessed(rows: int, per_row: float, room: int, labelled: float) -> cost.Tokens:
    """Rows of some length, packed as full as rows of mixed length are."""
    tokens = round(rows * per_row)
    return cost.Tokens(max(1, round(tokens / (FILL * room))), tokens, round(labelled * tokens))
