"""Write the configured formats into one folder."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.lib.export.formats import EXPORTERS
from stages.lib.export.formats.exporter import Exporter, Trained
from stages.lib.schema.export import Format


@dataclass(frozen=True)
class Written:
    """One format on disk: a file, or a folder."""

    form: Format
    path: Path

    @property
    def exporter(self) -> Exporter:
        return EXPORTERS[self.form]


def write_formats(trained: Trained, folder: Path) -> list[Written]:
    """Every format of export.formats that this machine can write; what it cannot is said.

    Raises: ExternalError or ModelError, as the formats do.
    """
    folder.mkdir()
    written = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for form in trained.export.formats:
            exporter = EXPORTERS[form]
            if reason := exporter.absent():
                print(f"{form}: left out, {reason}")
                continue
            path = folder / exporter.file_name(trained.name)
            exporter.write(replace(trained, scratch=Path(scratch)), path)
            written.append(Written(form, path))
    return written


def recommended(written: Sequence[Written]) -> str | None:
    """The GGUF file that card and Modelfile name: q8_0 where there is one, else the first."""
    files = {one.form: one.path.name for one in written if one.path.suffix == ".gguf"}
    return files[Format.gguf_q8_0] if Format.gguf_q8_0 in files else next(iter(files.values()), None)
