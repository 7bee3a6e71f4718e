"""conf/lora: the adapter (LoRA, arXiv:2106.09685; on a 4-bit base, arXiv:2305.14314)."""

from dataclasses import dataclass
from typing import Any

from stages.lib.errors import check_values


@dataclass
class Lora:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # `all-linear`, `attention`, `mlp`, or a list of module names

    def __post_init__(self) -> None:
        is_named = self.target_modules in ("all-linear", "attention", "mlp")
        is_list = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        check_values(
            ("lora.r", self.r, self.r > 0, "a positive rank"),
            ("lora.alpha", self.alpha, self.alpha > 0, "above 0"),
            ("lora.dropout", self.dropout, 0 <= self.dropout < 1, "at least 0, below 1"),
            (
                "lora.target_modules",
                self.target_modules,
                is_named or (is_list and bool(self.target_modules)),
                "all-linear, attention, mlp, or a list of names without quotes around it: [q_proj,v_proj]",
            ),
        )
