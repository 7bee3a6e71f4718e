"""The formats a trained model leaves in. One more: a module, its name in schema.export.Format, its entry below."""

from stages.lib.export.formats import adapter, bitsandbytes, compressed, gguf, gguf_lora, onnx, safetensors
from stages.lib.export.formats.exporter import Exporter
from stages.lib.schema.export import Format

EXPORTERS: dict[Format, Exporter] = {
    **{form: gguf.Gguf(form) for form in gguf.KINDS},
    Format.gguf_lora: gguf_lora.GgufLora(),
    Format.bnb_nf4: bitsandbytes.Nf4(),
    Format.bnb_int8: bitsandbytes.Int8(),
    Format.safetensors: safetensors.Safetensors(),
    Format.adapter: adapter.Adapter(),
    Format.onnx_int4: onnx.Int4(),
    **{form: compressed.Compressed(form) for form in compressed.SCHEMES},
}
