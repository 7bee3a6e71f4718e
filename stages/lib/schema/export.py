"""conf/export: the formats that leave the pipeline."""

from dataclasses import dataclass

from stages.lib.errors import check_values


@dataclass
class Export:
    formats: list[str]
    max_kl: dict[str, float]  # nats per token against the merged model, by format; a format not named is reported only
    rows: int  # held-out rows measured
    gguf_pre_tokenizer: str | None  # llama.cpp's name of the pre-tokenizer, where its converter does not know the tokenizer

    def __post_init__(self) -> None:
        check_values(
            ("export.formats", self.formats, bool(self.formats), "at least one format"),
            ("export.rows", self.rows, self.rows > 0, "a positive number of rows"),
        )
