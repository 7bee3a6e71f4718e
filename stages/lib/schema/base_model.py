"""conf/base_model: the pretrained model that is fine-tuned."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from stages.lib.errors import check_values

COMMIT = r"[0-9a-f]{40}"
PINNED = r"[A-Za-z0-9._-]+==[^=<>*]+"
SHA256 = r"[0-9a-f]{64}"


class Source(StrEnum):
    package = "package"
    hub = "hub"


@dataclass
class Part:
    """A file of a registry package, as the registry is held to it."""

    package: str  # name==version
    file: str  # path inside the package
    sha256: str


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
    package_parts: list[Part] = field(default_factory=list)  # pieces of the file, in order, where it comes in several
    license_file: str | None = None  # the licence's own text inside the package, laid beside the weights
    license_notice: str | None = None  # what the licence wants every copy to say, in a file NOTICE

    def __post_init__(self) -> None:
        if self.source is Source.hub:
            check_values(
                ("base_model.id", self.id, bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.id)), "owner/name on the hub"),
                (
                    "base_model.revision",
                    self.revision,
                    bool(re.fullmatch(COMMIT, self.revision or "")),
                    "a commit of 40 hex digits. A branch moves; type `make pin` once: it asks the hub and writes the "
                    "commit into conf/base_model",
                ),
            )
        else:
            check_values(
                (
                    "base_model.package",
                    self.package,
                    bool(re.fullmatch(PINNED, self.package or "")),
                    "a pinned package of the registry, name==version",
                ),
                (
                    "base_model.package_file",
                    self.package_file,
                    bool(self.package_file),
                    "the GGUF file inside the package",
                ),
                (
                    "base_model.package_sha256",
                    self.package_sha256,
                    bool(re.fullmatch(SHA256, self.package_sha256 or "")),
                    "the sha256 of that file, 64 hex digits",
                ),
                *(
                    (
                        f"base_model.package_parts[{i}]",
                        vars(part),
                        bool(re.fullmatch(PINNED, part.package) and part.file and re.fullmatch(SHA256, part.sha256)),
                        "package: name==version, file: its path inside, sha256: 64 hex digits",
                    )
                    for i, part in enumerate(self.package_parts)
                ),
            )

    def pinned_revision(self) -> str:
        """The commit; a hub model without one has been refused above."""
        assert self.revision is not None
        return self.revision

    def pinned_package(self) -> Part:
        """The package and the file that is made of it."""
        assert self.package is not None
        assert self.package_file is not None
        assert self.package_sha256 is not None
        return Part(self.package, self.package_file, self.package_sha256)
