"""conf/export: the formats that leave the pipeline."""

from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Format(StrEnum):
    gguf_f16 = "gguf_f16"
    gguf_bf16 = "gguf_bf16"
    gguf_q8_0 = "gguf_q8_0"
    gguf_q6_k = "gguf_q6_k"
    gguf_q5_k_m = "gguf_q5_k_m"
    gguf_q4_k_m = "gguf_q4_k_m"
    gguf_lora = "gguf_lora"
    bnb_nf4 = "bnb_nf4"
    bnb_int8 = "bnb_int8"
    safetensors = "safetensors"
    adapter = "adapter"
    onnx_int4 = "onnx_int4"
    compressed_w4a16 = "compressed_w4a16"
    compressed_w8a8 = "compressed_w8a8"


@dataclass
class Export:
    formats: list[Format]
    max_kl: dict[str, float]  # nats per token against the trained model, by format; a format not named is reported only
    min_stopped: float  # share of answers that a format must end by itself in its runtime, of those tuned ended
    chats: int  # of the data, which files and runtimes must write as training did; made-up hard ones come on top
    rows: int  # held-out conversations measured
    answers: dict[str, int]  # test prompts answered in its runtime by format; a format not named answers `probes`
    probes: int  # answered prompts whose token probabilities are compared with the trained model's
    sbom: bool  # also write a bill of materials, which needs the extra `sbom`
    gguf_pre_tokenizer: str | None  # llama.cpp's name of it, where its converter does not know the tokenizer
    imatrix_rows: int  # rows of training text that tell k-quants which weights matter most; 0: none

    def __post_init__(self) -> None:
        known = {str(choice) for choice in Format}
        check_values(
            (
                "export.formats",
                self.formats,
                bool(self.formats) and len(set(self.formats)) == len(self.formats),
                f"one or more of {', '.join(sorted(known))}, none twice",
            ),
            (
                "export.max_kl",
                self.max_kl,
                set(self.max_kl) <= known and all(limit > 0 for limit in self.max_kl.values()),
                "formats with limits above 0 nats",
            ),
            (
                "export.answers",
                self.answers,
                set(self.answers) <= known and all(count > 0 for count in self.answers.values()),
                "formats with positive numbers of prompts",
            ),
            ("export.min_stopped", self.min_stopped, 0 <= self.min_stopped <= 1, "between 0 and 1"),
            ("export.chats", self.chats, self.chats >= 0, "0 or a number of chats"),
            ("export.rows", self.rows, self.rows > 0, "a positive number of rows"),
            ("export.probes", self.probes, self.probes > 0, "a positive number of prompts"),
            ("export.imatrix_rows", self.imatrix_rows, self.imatrix_rows >= 0, "0 (none) or a number of rows"),
        )
