"""conf/base_model: the pretrained model that is fine-tuned."""

import re
from dataclasses import dataclass
from enum import StrEnum

from stages.lib.errors import check_values


class Source(StrEnum):
    package = "package"
    hub = "hub"


@dataclass
class BaseModel:
    source: Source
    id: str  # name on the Hugging Face hub; also the name in cards and reports
    revision: str | None  # 40-hex commit on the hub; null until `make pin` has resolved it
    package: str | None  # registry package that ships the weights as GGUF, pinned: name==version
    package_file: str | None
    package_sha256: str | None
    license: str
    license_url: str

    def __post_init__(self) -> None:
        is_sha = self.revision is None or bool(re.fullmatch(r"[0-9a-f]{40}", self.revision))
        check_values(
            ("base_model.revision", self.revision, is_sha, "a commit of 40 hex digits (`make pin` resolves one)"),
            (
                "base_model.package",
                self.package,
                self.source is not Source.package or bool(self.package and "==" in self.package),
                "name==version, with base_model.package_file and package_sha256, when base_model.source=package",
            ),
        )
