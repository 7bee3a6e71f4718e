"""conf/lora: what is trained beside the frozen base, or instead of it."""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stages.lib.errors import ConfigError, check_values
from stages.lib.schema.numerics import Numerics, Quantization


class Method(StrEnum):
    lora = "lora"  # W + s B A, B starts at 0: arXiv:2106.09685; on a 4-bit base, arXiv:2305.14314
    dora = "dora"  # LoRA for directions, a vector for lengths: arXiv:2402.09353
    pissa = "pissa"  # LoRA that starts at the r largest singular directions of W: arXiv:2404.02948
    olora = "olora"  # LoRA that starts at the first r columns of W = QR: arXiv:2406.01775
    ia3 = "ia3"  # vectors that scale keys, values and the feed-forward's inner activations: arXiv:2205.05638
    prompt_tuning = "prompt_tuning"  # embeddings before every prompt: arXiv:2104.08691
    prefix_tuning = "prefix_tuning"  # keys and values before every prompt, in every layer: arXiv:2101.00190
    full = "full"  # the weights themselves; with last_layers only those of the last layers


LOW_RANK = (Method.lora, Method.dora, Method.pissa, Method.olora)
FROM_WEIGHTS = (Method.pissa, Method.olora)
VIRTUAL = (Method.prompt_tuning, Method.prefix_tuning)
GROUPS = ("all-linear", "attention", "mlp")


class AlphaMode(StrEnum):
    """How the scaling s of B A comes from alpha and r."""

    fixed = "fixed"  # alpha / r
    ratio = "ratio"  # alpha, at any r
    rslora = "rslora"  # alpha / sqrt(r): arXiv:2312.03732


@dataclass
class Lora:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # one of GROUPS, a list of module names, or a regular expression of full names
    method: Method = Method.lora
    alpha_mode: AlphaMode = AlphaMode.fixed
    modules_to_save: list[str] = field(default_factory=list)  # trained whole, beside the adapter
    last_layers: int | None = None
    virtual_tokens: int = 20

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        by = {AlphaMode.fixed: self.r, AlphaMode.ratio: 1, AlphaMode.rslora: math.sqrt(self.r)}
        return self.alpha / by[self.alpha_mode]

    def __post_init__(self) -> None:
        is_list = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        is_pattern = isinstance(self.target_modules, str) and _is_pattern(self.target_modules)
        is_whole = self.method is Method.full and self.last_layers is None
        check_values(
            ("lora.r", self.r, self.r > 0, "a positive rank"),
            ("lora.alpha", self.alpha, self.alpha > 0, "above 0"),
            ("lora.dropout", self.dropout, 0 <= self.dropout < 1, "at least 0, below 1"),
            (
                "lora.dropout",
                self.dropout,
                self.dropout == 0 or self.method in LOW_RANK,
                f"0, for lora.method={self.method} has no dropout of its own",
            ),
            (
                "lora.target_modules",
                self.target_modules,
                is_pattern or (is_list and bool(self.target_modules)),
                f"{', '.join(GROUPS)}, a list of names without quotes around it: [q_proj,v_proj], or a regular "
                "expression that matches full names",
            ),
            (
                "lora.modules_to_save",
                self.modules_to_save,
                not self.modules_to_save or not (self.method in VIRTUAL or is_whole),
                f"[] with lora.method={self.method}",
            ),
            (
                "lora.last_layers",
                self.last_layers,
                self.last_layers is None or (self.last_layers > 0 and self.method is Method.full),
                "null, or with lora.method=full a positive number of layers",
            ),
            ("lora.virtual_tokens", self.virtual_tokens, self.virtual_tokens > 0, "above 0"),
        )


def check_together(lora: Lora, numerics: Numerics, *, gradient_checkpointing: bool) -> None:
    """What a method asks of other sections; known without the model.

    Raises: ConfigError, naming the keys.
    """
    if lora.method is Method.full and numerics.quantization is not Quantization.none:
        raise ConfigError(
            f"numerics.quantization: found {numerics.quantization} with lora.method=full, expected none: quantized "
            "weights cannot be trained. Set numerics.quantization=none, or another lora.method."
        )
    if lora.method in (Method.dora, *FROM_WEIGHTS) and numerics.quantization is Quantization.int8:
        raise ConfigError(
            f"numerics.quantization: found int8 with lora.method={lora.method}, expected nf4, fp4 or none: 8-bit "
            "layers round their inputs, so that a reloaded adapter would not be the trained one, and PEFT's DoRA "
            "cannot measure them. Set another quantization, or lora.method=lora."
        )
    if lora.method is Method.prefix_tuning and gradient_checkpointing:
        raise ConfigError(
            "train.gradient_checkpointing: found true with lora.method=prefix_tuning, expected false: what is computed "
            "again would not see the prefix. Set train.gradient_checkpointing=false, or lora.method=prompt_tuning."
        )


def _is_pattern(text: str) -> bool:
    """Is it a regular expression of names? A list in quotes would be one of a single letter."""
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text) and not text.startswith("[")
