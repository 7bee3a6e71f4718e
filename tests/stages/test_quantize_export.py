"""quantize_export: every format is loaded again and measured; one that is not the trained model stops the stage."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GgufConfig

from stages import quantize_export
from stages.lib import apart, chat, fidelity, files, models
from stages.lib.errors import DataError, ExternalError, GateError, ModelError
from stages.lib.export import manifest, modelfile, round_trip
from stages.lib.export.formats import EXPORTERS, gguf, llama_cpp
from stages.lib.export.formats.exporter import Request
from stages.lib.schema.export import Format
from tests.export_settings import FORMATS, NAME, params
from tests.exported import NUMERICS

ROWS = [[1, 20, 30, 40, 50], [1, 33, 70]]


@pytest.fixture
def inside(merged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(merged)
    return merged


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_format_is_written_and_measured(exported: Path) -> None:
    found = files.read_json(exported / "metrics/quantize_export.json")
    for form in FORMATS:
        assert found[f"export/{form}/kl/mean"] <= found[f"export/{form}/kl/p99"]
        assert 0 <= found[f"export/{form}/top1"] <= 1
    sizes = [found[f"export/{form}/bits_per_weight"] for form in FORMATS]
    assert sizes[0] > sizes[1] > sizes[2]
    assert found["export/gguf_q8_0/kl/mean"] < found["export/gguf_q4_k_m/kl/mean"]
    assert found["export/gguf_q8_0/fallback_tensors"] == 0
    assert found["ladder/tuned/kl/mean"] == 0
    assert found["ladder/merged/kl/mean"] < found["ladder/base/kl/mean"] != found["ladder/fewshot/kl/mean"]
    assert found["ladder/base/mib"] < found["ladder/tuned/mib"] < found["ladder/merged/mib"]
    assert found["ladder/base/task/parameters/field_f1/delta"] == -1  # base answered nothing right, tuned everything
    assert found["export/skipped"] == 0
    for form in FORMATS:
        assert found[f"export/{form}/round_trip/chats"] == 5 + len(round_trip.HARD) + 1
        assert found[f"export/{form}/round_trip/control_text"] == 1
    low, delta, high = (found[f"export/gguf_q8_0/task/parameters/field_f1/{name}"] for name in ("low", "delta", "high"))
    assert low <= delta <= high


@pytest.mark.slow
def test_a_second_export_from_another_folder_gives_the_same_bytes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "a b" / "c"
    shutil.copytree(exported, elsewhere)
    for made in ("models/export", "metrics/quantize_export.json", "plots"):
        path = elsewhere / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(elsewhere)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quantize_export.main(params())
    finally:
        torch.set_num_threads(threads)
    for made in ("models/export", "metrics", "plots"):
        assert digests(elsewhere / made) == digests(exported / made)


def test_the_manifest_names_every_file_and_sees_a_change(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported / "models/export", folder)
    manifest.verify(folder)
    recorded = files.read_json(folder / "manifest.json")
    assert recorded["base"]["id"] == "tiny/llama"
    assert recorded["adapter"]["adapter_model.safetensors"] == files.sha256(
        exported / "models/adapter/adapter_model.safetensors"
    )
    assert set(recorded["data"]["files"]) == {"test.parquet", "train.parquet", "validation.parquet"}
    (folder / "README.md").write_text("changed")
    (folder / "more").touch()
    with pytest.raises(DataError, match=r"README.md: changed\n  more: unknown"):
        manifest.verify(folder)


def test_gguf_holds_the_template_and_stop_of_training_and_no_place(exported: Path) -> None:
    file = exported / "models/export" / f"{NAME}-Q8_0.gguf"
    tokenizer = chat.load_tokenizer(exported / "models/base")
    assert gguf.metadata(file, "tokenizer.chat_template") == tokenizer.chat_template
    assert gguf.metadata(file, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert gguf.metadata(file, "general.name") == NAME
    for path in (exported / "models/export").rglob("*"):
        assert path.is_dir() or str(exported).encode() not in path.read_bytes(), path


def test_nf4_keeps_the_training_which_a_second_rounding_of_the_same_grid_would_take_back(exported: Path) -> None:
    expected = fidelity.reference(
        fidelity.of(models.load_tuned(exported / "models/base", exported / "models/adapter", NUMERICS, dense=True)),
        ROWS,
    )
    shipped = models.load_base(exported / "models/export/bnb_nf4", NUMERICS)
    base = models.load_base(exported / "models/base", NUMERICS)
    kl, kl_of_base = (fidelity.compare(expected, fidelity.of(model)).kl_mean for model in (shipped, base))
    assert kl < kl_of_base
    size = EXPORTERS[Format.bnb_nf4].size(exported / "models/export/bnb_nf4", shipped.num_parameters())
    assert size.bits_per_weight < 10


def test_modelfile_renders_chats_as_the_template_does_and_stops_at_the_end_of_turn(exported: Path) -> None:
    text = (exported / "models/export/Modelfile").read_text()
    tokenizer = chat.load_tokenizer(exported / "models/base")
    assert f"FROM ./{NAME}-Q8_0.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    turns = round_trip.HARD[0]
    assert go(template, turns) == chat.render(tokenizer, turns, add_generation_prompt=True)


def go(template: str, messages: Any) -> str:
    """The few forms of Go's template language that the Modelfile uses."""
    loop, generation = template.removeprefix("{{ range .Messages }}").rsplit("{{ end }}", 1)
    written = ""
    for message in messages:
        for branch in loop.split('{{ if eq .Role "')[1:]:
            role, body = branch.removesuffix("{{ end }}").split('" }}', 1)
            if role == message["role"]:
                written += body.replace("{{ .Content }}", message["content"])
    return written + generation


def test_a_template_with_a_system_turn_of_its_own_becomes_system(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = modelfile.pieces(tokenizer, ["<|im_end|>"])
    assert found is not None
    assert found.system == "Be brief."
    assert found.opening["user"] == "<|im_start|>user\n"
    assert 'SYSTEM """Be brief."""' in modelfile.write("x.gguf", found, ["<|im_end|>"], 64)


def test_a_template_that_counts_its_turns_gets_no_modelfile(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = "{% for message in messages %}{{ loop.index }}{{ message['content'] }}{% endfor %}"
    assert modelfile.pieces(tokenizer, ["<|im_end|>"]) is None


def test_the_card_has_metadata_results_and_limits(exported: Path) -> None:
    card = ModelCard.load(exported / "models/export/README.md")
    assert card.data.base_model == "tiny/llama"
    assert card.data.license == "apache-2.0"
    assert "| parameters | field F1 | 0.000 | 0.250 | 0.750 | +0.750 | +0.500 to +0.875 |" in card.text
    assert "dequantized from Q4_1" in card.text
    for form in FORMATS:
        assert f"| {form} |" in card.text
    (q8_0,) = (line for line in card.text.splitlines() if line.startswith("| gguf_q8_0 |"))
    assert re.search(r"\| parameters, field F1: [+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", q8_0)


@pytest.mark.slow
def test_a_format_further_than_its_limit_breaks_the_gate_and_leaves_nothing(inside: Path) -> None:
    before = digests(Path("models"))
    with pytest.raises(GateError, match=r"gguf_q8_0: mean KL .* at most 1e-12(.|\n)*export.max_kl"):
        quantize_export.main(params(formats=[Format.gguf_q8_0], max_kl={"gguf_q8_0": 1e-12}))
    assert digests(Path("models")) == before


def test_the_quick_way_into_transformers_loads_what_its_own_loader_loads(exported: Path) -> None:
    file = exported / "models/export" / f"{NAME}-Q4_K_M.gguf"
    quick = gguf.load(GGUFReader(file), exported / "models/merged", NUMERICS).state_dict()
    own = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert quick.keys() == own.keys()
    assert all(torch.equal(quick[name], own[name]) for name in own)


def test_a_file_of_another_shape_is_refused(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    writer = GGUFWriter(other, "llama")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"llama.block_count is 3, expected num_hidden_layers=2"):
        gguf.load(GGUFReader(other), exported / "models/merged", NUMERICS)


def test_a_missing_converter_is_one_message_and_nothing_half_written(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(Path("models"))
    monkeypatch.setattr(gguf, "CONVERTER", tmp_path / "nowhere")
    with pytest.raises(ExternalError, match=r"nowhere: no convert_hf_to_gguf.py .*make env"):
        quantize_export.main(params())
    assert digests(Path("models")) == before


@pytest.mark.slow
def test_a_tokenizer_the_converter_does_not_know_names_the_key(inside: Path) -> None:
    with pytest.raises(ModelError, match=r"does not know this tokenizer.*export.gguf_pre_tokenizer"):
        quantize_export.main(params(gguf_pre_tokenizer=None))


def test_a_runtime_that_crashes_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF broken")
    with pytest.raises(ExternalError, match=r"llama.cpp with broken.gguf: the process (was ended|ended)"):
        llama_cpp.ask(tmp_path / "broken.gguf", Request([], [[1, 2]], [2], 2))


def test_a_crash_is_told_apart_from_an_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(ExternalError, match="trying it: the process was ended by signal 11"):
        apart.run("trying it", "crash", environment={"PYTHONPATH": str(tmp_path)})


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hang.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(apart, "PATIENCE_S", 1)
    with pytest.raises(ExternalError, match="trying it: no end after 1 s"):
        apart.run("trying it", "hang", environment={"PYTHONPATH": str(tmp_path)})


@pytest.mark.slow
def test_only_the_asked_formats_are_written(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(inside, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    quantize_export.main(params(formats=[Format.gguf_q8_0], answers={}))
    names = {path.name for path in Path("models/export").iterdir()}
    beside = {"LICENSE.md", "Modelfile", "README.md", "generation_config.json", "ladder.svg", "manifest.json"}
    assert names == {f"{NAME}-Q8_0.gguf", *beside}
    assert list(json.loads(Path("models/export/manifest.json").read_text())["formats"]) == ["gguf_q8_0"]
