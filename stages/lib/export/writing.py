"""Write the configured formats into one folder."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.lib.export.formats import EXPORTERS, gguf
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


def write_formats(trained: Trained, folder: Path) -> tuple[list[Written], dict[str, str]]:
    """Every format of export.formats that this machine can write, and why it cannot write the others.

    Raises: ExternalError or ModelError, as the formats do.
    """
    folder.mkdir()
    written, skipped = [], {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for form in trained.export.formats:
            exporter = EXPORTERS[form]
            if reason := exporter.absent():
                print(f"{form}: left out, {reason}")
                skipped[str(form)] = reason
                continue
            path = folder / exporter.file_name(trained.name)
            exporter.write(replace(trained, scratch=Path(scratch)), path)
            written.append(Written(form, path))
    return written, skipped


def recommended(written: Sequence[Written]) -> str | None:
    """The GGUF file that card, Modelfile and server name: q8_0 where there is one, else the first whole model."""
    files = {one.form: one.path.name for one in written if one.form in gguf.KINDS}
    return files[Format.gguf_q8_0] if Format.gguf_q8_0 in files else next(iter(files.values()), None)
