"""The formats of llama.cpp and of transformers folders: what is written is the model that was given, or one message."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from peft import PeftModel

from stages.lib import (
    apart,
    chat,
    fidelity,
    gguf_lora_convert,
    gguf_quantize,
    gguf_weights,
    imatrix,
    merging,
    models,
    stage,
)
from stages.lib.errors import DataError, ExternalError, ModelError
from stages.lib.export.formats import EXPORTERS, gguf, gguf_lora
from stages.lib.export.formats.exporter import Request, Trained
from stages.lib.schema.export import Export, Format
from stages.lib.schema.merge import Dtype
from stages.lib.schema.numerics import Quantization
from tests.conftest import ROOT
from tests.exported import MERGE, NUMERICS, make_inputs

ROWS = [[1, 20, 30, 40, 50, 60, 70, 80], [1, 33, 70, 12, 9]]
PLAIN = replace(NUMERICS, quantization=Quantization.none)
RECIPE = replace(MERGE, dtype=Dtype.float16)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny base, its adapter and the merged model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_inputs(tiny_model_dir)
        merged = merging.merge(Path("models/base"), Path("models/adapter"), RECIPE, NUMERICS)
        merging.save(merged, Path("models/base"), Path("models/merged"))
    values = yaml.safe_load((ROOT / "conf/export/gguf_and_nf4.yaml").read_text()) | {"gguf_pre_tokenizer": "gpt-2"}
    places = (folder / "models/base", folder / "models/adapter", folder / "models/merged", folder / "data/splits")
    return Trained("tiny-tuned", *places, folder, Export(**values), NUMERICS, RECIPE)


def write(form: Format, trained: Trained, folder: Path) -> Path:
    path = folder / EXPORTERS[form].file_name(trained.name)
    EXPORTERS[form].write(replace(trained, scratch=folder), path)
    return path


def distance(expected: fidelity.LogProbs, found: fidelity.LogProbs, rows: Sequence[Sequence[int]] = ROWS) -> float:
    return fidelity.compare(fidelity.reference(expected, rows), found).kl_mean


def tuned(trained: Trained, *, adapter: Path | None = None) -> PeftModel:
    """The 16-bit base with an adapter."""
    return models.load_tuned(trained.base, adapter or trained.adapter, PLAIN)


@pytest.mark.parametrize(
    ("form", "bits"), [(Format.safetensors, 16), (Format.bnb_int8, 9), (Format.bnb_nf4, 6), (Format.adapter, 32)]
)
def test_a_folder_holds_the_model_it_was_written_from(
    form: Format, bits: float, trained: Trained, tmp_path: Path
) -> None:
    path = write(form, trained, tmp_path)
    again = write(form, trained, tmp_path / "again") if (tmp_path / "again").mkdir() is None else path
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    exporter = EXPORTERS[form]
    merged = models.load_dense(trained.merged, NUMERICS)
    expected = {
        Format.safetensors: lambda: merged,
        Format.adapter: lambda: models.load_tuned(trained.base, trained.adapter, NUMERICS),
        Format.bnb_nf4: lambda: models.load_base(exporter.merged(replace(trained, scratch=tmp_path)), NUMERICS),
        Format.bnb_int8: lambda: models.load_base(trained.merged, replace(NUMERICS, quantization=Quantization.int8)),
    }[form]()
    assert distance(fidelity.of(expected), exporter.log_probs(path, trained)) < 1e-9
    assert exporter.size(path, merged.num_parameters()).bits_per_weight == pytest.approx(bits, abs=1.5)
    assert (path / "tokenizer.json").read_bytes() == (trained.base / "tokenizer.json").read_bytes()


def test_nf4_unpacked_answers_as_its_packed_layers_do_to_the_bit(trained: Trained, tmp_path: Path) -> None:
    path = write(Format.bnb_nf4, trained, tmp_path)
    packed, unpacked = (models.load_base(path, NUMERICS, dense=dense) for dense in (False, True))
    for row in ROWS:
        assert torch.equal(fidelity.log_probs(packed, row, 1), fidelity.log_probs(unpacked, row, 1))


def rooted(adapter: Path, folder: Path, **changes: Any) -> Path:
    """The adapter with other settings."""
    shutil.copytree(adapter, folder)
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
def test_a_gguf_adapter_adds_to_each_weight_what_the_adapter_does(
    changes: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    adapter = rooted(trained.adapter, tmp_path / "adapter", **changes)
    path = write(Format.gguf_lora, replace(trained, adapter=adapter), tmp_path)
    found = gguf_lora.load(gguf_weights.read(path), trained.base, NUMERICS)
    expected = tuned(trained, adapter=adapter).merge_and_unload()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), weight, rtol=1e-5, atol=1e-6)
    assert EXPORTERS[Format.gguf_lora].size(path, 1).fallback_tensors == 0


class Converter:
    """Stands in for llama.cpp's: it swaps the halves of q, splits what is fused, and scales what is scaled."""

    def modify_tensors(self, weight: torch.Tensor, name: str, block: int | None) -> list[tuple[str, torch.Tensor]]:
        if "q_proj" in name:
            return [(f"blk.{block}.attn_q.weight", torch.cat(weight.chunk(2)[::-1]))]
        if "qkv" in name:
            return [("q", weight[:2]), ("k", weight[2:])]
        return [("scaled", 2 * weight)]


def test_rows_of_an_adapter_go_where_the_converter_puts_those_of_the_weight() -> None:
    name, rows = gguf_lora_convert.where(Converter(), "model.layers.3.self_attn.q_proj.weight", (4, 6))
    assert name == "blk.3.attn_q.weight"
    assert rows.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(("layer", "how"), [("qkv", "becomes .'q', 'k'."), ("other", "is changed")])
def test_a_weight_whose_rows_do_not_only_move_ends_the_conversion(layer: str, how: str) -> None:
    with pytest.raises(SystemExit, match=rf"{gguf_lora_convert.UNFIT}: {layer}.weight {how}"):
        gguf_lora_convert.where(Converter(), f"{layer}.weight", (4, 6))


@pytest.mark.slow
def test_llama_cpp_answers_with_the_gguf_adapter_as_transformers_does(trained: Trained, tmp_path: Path) -> None:
    path = write(Format.gguf_lora, trained, tmp_path)
    model = tuned(trained)
    session = EXPORTERS[Format.gguf_lora].ask(path, Request([], ROWS, [2], 6), trained)
    bare = 0.0
    for answer in session.answers:
        whole, start = [*answer.prompt, *answer.ids], len(answer.prompt)
        assert max(fidelity.gaps(fidelity.log_probs(model, whole, start), answer.top[: len(answer.ids)])) < 0.02
        with model.disable_adapter():
            bare = max([bare, *fidelity.gaps(fidelity.log_probs(model, whole, start), answer.top[: len(answer.ids)])])
    assert bare > 0.1  # the base alone would not have passed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_an_adapter_llama_cpp_cannot_take_is_one_message(
    changes: dict[str, Any], named: str, trained: Trained, tmp_path: Path
) -> None:
    adapter = rooted(trained.adapter, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=rf"found {named}, expected a plain LoRA .* gguf_lora out of export.formats"):
        write(Format.gguf_lora, replace(trained, adapter=adapter), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_mean_squares_are_those_of_the_inputs_on_any_number_of_threads(trained: Trained) -> None:
    model = models.load_dense(trained.merged, NUMERICS)
    found = imatrix.mean_squares(model, ROWS)
    first = torch.cat([model.model.embed_tokens(torch.tensor(row)) for row in ROWS])  # (T, D)
    expected = model.model.layers[0].input_layernorm(first).square().mean(dim=0)
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.weight"], expected, rtol=1e-5, atol=1e-6)
    assert len(found) == 2 * 7  # every linear layer but the output embedding
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = imatrix.mean_squares(model, ROWS)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_more_imatrix_rows_than_there_is_training_text_is_one_message(trained: Trained, tmp_path: Path) -> None:
    shutil.copy(trained.splits / "validation.parquet", tmp_path / "train.parquet")
    assert len(imatrix.training_text(tmp_path, trained.merged, 2)) == 2
    with pytest.raises(DataError, match=r"train.parquet: 2 usable rows, expected the 3 of export.imatrix_rows"):
        imatrix.training_text(tmp_path, trained.merged, 3)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K])
def test_important_channels_are_rounded_less(kind: GGMLQuantizationType) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(32, 512)).astype(np.float32)
    importance = random.exponential(size=512).astype(np.float32) ** 2

    def error(given: np.ndarray | None) -> float:
        blocks = gguf_quantize.quantized(weights, kind, given)
        return float((importance * (dequantize(blocks.reshape(32, -1), kind) - weights) ** 2).sum())

    assert error(importance) < 0.95 * error(None)


@pytest.mark.slow
def test_an_importance_matrix_changes_quantized_blocks_and_nothing_else(trained: Trained, tmp_path: Path) -> None:
    shutil.copy(trained.splits / "test.parquet", trained.splits / "train.parquet")
    plain = write(Format.gguf_q4_k_m, trained, tmp_path)
    wide = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "wide.gguf").tensors}
    (tmp_path / "weighed").mkdir()
    weighed = write(
        Format.gguf_q4_k_m, replace(trained, export=replace(trained.export, imatrix_rows=4)), tmp_path / "weighed"
    )
    before, after = (GGUFReader(path) for path in (plain, weighed))
    assert before.fields.keys() == after.fields.keys()
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        matters = one.name.startswith("blk") and len(one.shape) > 1
        assert np.array_equal(one.data, other.data) != matters, one.name
        if matters:  # without a matrix, what is called for it writes what llama.cpp's own quantization wrote
            blocks = gguf_quantize.quantized(wide[one.name].data.astype(np.float32), one.tensor_type, None)
            assert np.array_equal(blocks, one.data.reshape(-1)), one.name


def a_file(path: Path, kinds: dict[str, GGMLQuantizationType]) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ß", "", "漢"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3, 1])
    for name, kind in kinds.items():
        blocks = gguf_quantize.quantized(np.ones((2, 256), np.float32), kind, None)
        writer.add_tensor(name, blocks.reshape(2, -1), raw_dtype=kind)
    writer.add_tensor("norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_matrix_held_wider_than_the_format_says_is_a_fallback(tmp_path: Path) -> None:
    types = GGMLQuantizationType
    file = a_file(tmp_path / "a.gguf", {"a": types.Q6_K, "b": types.Q8_0, "c": types.Q4_K, "d": types.Q5_0})
    fallbacks = {
        form: EXPORTERS[form].size(file, 1).fallback_tensors
        for form in (Format.gguf_q6_k, Format.gguf_q4_k_m, Format.gguf_q8_0)
    }
    assert fallbacks == {Format.gguf_q6_k: 3, Format.gguf_q4_k_m: 2, Format.gguf_q8_0: 3}


def test_the_quick_reader_reads_what_gguf_reads(tmp_path: Path) -> None:
    file = a_file(tmp_path / "a.gguf", {"a": GGMLQuantizationType.Q8_0})
    quick, own = gguf_weights.read(file), GGUFReader(file)
    assert {key: field.contents() for key, field in quick.fields.items()} == {
        key: field.contents() for key, field in own.fields.items()
    }
    for one, other in zip(quick.tensors, own.tensors, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.data, other.data)
    assert gguf_weights.read(file) is quick
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"a.gguf: cannot be read as a GGUF file"):
        gguf_weights.read(file)


@pytest.mark.slow
def test_an_architecture_the_converter_does_not_know_is_one_message(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.merged, other)
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["OtherForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    for form in (Format.gguf_f16, Format.gguf_lora):
        with pytest.raises(ModelError, match=r"does not know the architecture OtherForCausalLM.*\n*.*export.formats"):
            write(form, replace(trained, merged=other, base=other), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_full_disk_is_said_whatever_a_library_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: str) -> None:
        (tmp_path / "full.py").write_text(f"import sys\nsys.exit({words!r})\n")
        apart.run("writing gguf_q8_0", "full", writes=tmp_path / "file", environment={"PYTHONPATH": str(tmp_path)})

    with pytest.raises(ExternalError, match="failed with code 1"):
        fail("RuntimeError: failed with code 1")
    for words in ("OSError: [Errno 28] No space left on device", "OSError: Not enough free space to write 9 bytes"):
        with pytest.raises(OSError, match=rf"{stage.NO_SPACE} while writing gguf_q8_0"):
            fail(words)
    monkeypatch.setattr(apart, "LEAST_ROOM", 2**60)
    with pytest.raises(OSError, match=rf"{stage.NO_SPACE} while writing gguf_q8_0"):
        fail("RuntimeError: failed with code 1")


def test_what_the_converter_says_becomes_a_message_with_the_key(tmp_path: Path) -> None:
    unknown = gguf.named(ExternalError("ERROR:hf-to-gguf:Model Other is not supported"), tmp_path)
    assert isinstance(unknown, ModelError)
    assert "architecture Other" in str(unknown)
    assert "export.formats" in str(unknown)


def test_the_runtime_of_a_folder_writes_chats_as_training_did(trained: Trained, tmp_path: Path) -> None:
    path = write(Format.safetensors, trained, tmp_path)
    turns = [{"role": "user", "content": "the fox"}]
    session = EXPORTERS[Format.safetensors].ask(path, Request([turns], [*ROWS], [2], 3), trained)
    assert session.tokens == [chat.prompt_ids(chat.load_tokenizer(trained.base), turns)]
    assert [answer.prompt for answer in session.answers] == ROWS
