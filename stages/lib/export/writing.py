"""Write the configured formats into one folder."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.lib.export import gguf, nf4
from stages.lib.schema.export import Export, Format
from stages.lib.schema.numerics import Numerics


@dataclass(frozen=True)
class Written:
    """One format on disk: a GGUF file, or a folder for transformers."""

    form: Format
    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


def write_formats(merged: Path, folder: Path, name: str, p: Export, n: Numerics) -> list[Written]:
    """GGUF files by way of one 16-bit file, which is kept only where it is asked for; NF4 straight from the weights.

    Raises: ExternalError or ModelError, as gguf.convert and gguf.quantize do.
    """
    folder.mkdir()
    files = {form: folder / gguf.file_name(name, form) for form in p.formats if form.startswith("gguf_")}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wide: Path | None = None
        for form, file in files.items():
            if form in gguf.FLOATS:
                gguf.convert(merged, file, outtype=gguf.FLOATS[form], name=name, pre_tokenizer=p.gguf_pre_tokenizer)
                wide = file if form is Format.gguf_f16 or wide is None else wide
        if wide is None and files:
            wide = Path(scratch) / "wide.gguf"
            gguf.convert(merged, wide, outtype="f16", name=name, pre_tokenizer=p.gguf_pre_tokenizer)
        for form, file in files.items():
            if form not in gguf.FLOATS and wide is not None:
                gguf.quantize(wide, file, form)
    if Format.bnb_nf4 in p.formats:
        nf4.write(merged, folder / Format.bnb_nf4, n)
    return [Written(form, files[form] if form in files else folder / form) for form in p.formats]


def recommended(written: Sequence[Written]) -> str | None:
    """The GGUF file that card and Modelfile name: q8_0 where there is one, else the first."""
    files = {one.form: one.path.name for one in written if one.is_gguf}
    return files[Format.gguf_q8_0] if Format.gguf_q8_0 in files else next(iter(files.values()), None)
