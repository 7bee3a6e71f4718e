"""The adapter as a GGUF file, which llama.cpp lays over a GGUF file of the base (`--lora`)."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import PreTrainedModel

from stages.lib import apart, fidelity, files, gguf_lora_convert, gguf_weights, models
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import gguf, llama_cpp
from stages.lib.export.formats.exporter import Exporter, Request, Session, Size, Trained
from stages.lib.schema.numerics import ComputeDtype, Numerics


class GgufLora(Exporter):
    """llama.cpp has no NF4, so the base under it is the 16-bit one, not the 4-bit one the adapter was trained on."""

    runtime = "llama.cpp"
    measured_in = "transformers, on the 16-bit base"

    def file_name(self, name: str) -> str:
        return f"{gguf.plain(name)}-LoRA.gguf"

    def write(self, trained: Trained, path: Path) -> None:
        check_is_plain(trained.adapter)
        gguf.check_converter()
        try:
            apart.run(
                f"converting {trained.adapter} to GGUF",
                gguf_lora_convert.__name__,
                str(trained.base.resolve()),
                str(trained.adapter.resolve()),
                str(path.resolve()),
                trained.name,
                writes=path,
                environment={"PYTHONPATH": str(gguf.CONVERTER)},
            )
        except ExternalError as fault:
            if gguf_lora_convert.UNFIT in str(fault):
                raise ModelError(
                    f"{trained.adapter}: {str(fault).splitlines()[-1]}. Leave gguf_lora out of export.formats."
                ) from None
            raise gguf.named(fault, trained.base) from None

    def size(self, path: Path, weights: int) -> Size:
        """Of the adapter's own weights."""
        return gguf.contents(gguf_weights.read(path), frozenset({"F32"}))

    def log_probs(self, path: Path, trained: Trained) -> fidelity.LogProbs:
        return fidelity.of(load(gguf_weights.read(path), trained.base, trained.numerics))

    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            base = Path(scratch) / "base.gguf"
            pre_tokenizer = trained.export.gguf_pre_tokenizer
            gguf.convert(trained.base, base, outtype="f16", name=trained.name, pre_tokenizer=pre_tokenizer)
            return llama_cpp.ask(base, request, lora=path)


def check_is_plain(adapter: Path) -> None:
    """llama.cpp adds B A to weights and does nothing else.

    Raises: ModelError, when the adapter does more.
    """
    config = files.read_json(adapter / "adapter_config.json")
    more = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config["peft_type"] != "LORA":
        more.append(f"peft_type {config['peft_type']}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        more.append("biases")
    if more:
        raise ModelError(
            f"{adapter}: found {', '.join(more)}, expected a plain LoRA adapter, which is all that llama.cpp takes. "
            "Leave gguf_lora out of export.formats (the other formats hold the merged model), or train "
            "lora.method=lora with lora.modules_to_save=[]."
        )


def load(reader: GGUFReader, base: Path, n: Numerics) -> PreTrainedModel:
    """The 16-bit base with what the file adds to its weights, as llama.cpp would.

    Raises: ModelError, when the file holds a weight the base does not have.
    """
    model = models.load_dense(base, replace(n, compute_dtype=ComputeDtype.float32))
    architecture = gguf_weights.architecture_of(reader)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    names = gguf_weights.hugging_face_names(model, architecture)
    processor = gguf_weights.processor_of(model, architecture)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        place = name.removesuffix(".lora_a")
        if place not in names or f"{place}.lora_b" not in tensors:
            raise ModelError(f"GGUF adapter: {name} has no place in {base}. Export it again.")
        b = processor.process(
            weights=tensors[f"{place}.lora_b"], name=place, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        ).weights
        weight = model.get_parameter(names[place])
        added = torch.from_numpy(b.copy()).to(weight) @ torch.from_numpy(a.copy()).to(weight)
        weight.data += alpha / a.shape[0] * added
    return model
