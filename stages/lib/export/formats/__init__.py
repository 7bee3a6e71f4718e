"""The formats a trained model leaves in. One more: a module, its name in schema.export.Format, its entry below."""

from stages.lib.export.formats import bitsandbytes, compressed, gguf, onnx
from stages.lib.export.formats.exporter import Exporter
from stages.lib.schema.export import Format

EXPORTERS: dict[Format, Exporter] = {
    **{form: gguf.Gguf(form) for form in gguf.KINDS},
    Format.bnb_nf4: bitsandbytes.Nf4(),
    Format.onnx_int4: onnx.Int4(),
    **{form: compressed.Compressed(form) for form in compressed.SCHEMES},
}
