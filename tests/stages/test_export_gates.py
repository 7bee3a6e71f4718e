"""quantize_export's gates: an export that was spoilt is not the trained model, and the stage says so."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from stages.lib import chat, files, gguf_weights, models, records
from stages.lib.errors import GateError
from stages.lib.export import measuring, modelfile, round_trip, writing
from stages.lib.export.formats import EXPORTERS
from stages.lib.export.formats.exporter import Trained
from stages.lib.schema.export import Format
from tests.export_settings import NAME, params
from tests.exported import MERGE, NUMERICS

END = 2  # <|im_end|> of the tiny tokenizer


@pytest.fixture
def trained(exported: Path) -> Trained:
    made = exported / "models"
    splits = exported / "data/splits"
    return Trained(
        NAME, made / "base", made / "adapter", made / "merged", splits, made, params().export, NUMERICS, MERGE
    )


@pytest.fixture
def chats(trained: Trained) -> round_trip.Expected:
    return round_trip.expected(trained.splits, chat.load_tokenizer(trained.base), [END], 2)


def copied(whole: Path, folder: Path, change: Callable[[GGUFReader], None]) -> Path:
    """A GGUF file with something changed in place."""
    damaged = folder / whole.name
    shutil.copyfile(whole, damaged)
    reader = GGUFReader(damaged, "r+")
    change(reader)
    reader.data.flush()
    return damaged


def no_template(reader: GGUFReader) -> None:
    reader.fields["tokenizer.chat_template"].parts[1][-1] = ord("!")  # the key; no reader knows it now


def another_template(reader: GGUFReader) -> None:
    reader.fields["tokenizer.chat_template"].parts[-1][-3] = ord("!")


def another_stop(reader: GGUFReader) -> None:
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 7


def another_token(reader: GGUFReader) -> None:
    tokens = reader.fields["tokenizer.ggml.tokens"]
    tokens.parts[tokens.data[END]][0] = ord("!")


def an_ordinary_token(reader: GGUFReader) -> None:
    types = reader.fields["tokenizer.ggml.token_type"]
    types.parts[types.data[END]][0] = 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_template, r"tokenizer.chat_template: None, "),
        (another_template, r"tokenizer.chat_template, from place \d+: '!"),
        (another_stop, r"tokenizer.ggml.eos_token_id: 7, 2"),
        (another_token, r"tokenizer.ggml.tokens: 1 differ, token 2 is '!\|im_end\|>', '<\|im_end\|>'"),
        (an_ordinary_token, r"tokenizer.ggml.token_type: token 2 '<\|im_end\|>' is NORMAL, an added token"),
    ],
)
def test_a_gguf_head_that_is_not_trainings_breaks_the_gate(
    trained: Trained, chats: round_trip.Expected, tmp_path: Path, change: Callable[[GGUFReader], None], told: str
) -> None:
    whole = trained.scratch / "export" / f"{NAME}-Q8_0.gguf"
    round_trip.check_files(whole, chats)
    written = [writing.Written(Format.gguf_q8_0, copied(whole, tmp_path, change))]
    test = records.read(trained.splits / "test.parquet")
    with pytest.raises(GateError, match=f"llama-tuned-Q8_0.gguf: not what the model was trained with(.|\n)*{told}"):
        measuring.ask(written, trained, test, chats, params().export, params().evaluate)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def with_another_stop(folder: Path) -> None:
    path = folder / "generation_config.json"
    given = files.read_json(path) if path.is_file() else {}
    files.write_json(path, given | {"eos_token_id": [END, 7]})


def without_an_added_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_off|>"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_template, "has no chat template"),
        (with_another_stop, r"eos_token_id: \[2, 7\], among the stop ids \[2\]"),
        (without_an_added_token, "vocabulary, from place 2: "),
    ],
)
def test_a_folder_that_is_not_trainings_breaks_the_gate(
    trained: Trained, chats: round_trip.Expected, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "bnb_nf4"
    shutil.copytree(trained.scratch / "export/bnb_nf4", folder)
    round_trip.check_files(folder, chats)
    change(folder)
    with pytest.raises(GateError, match=f"bnb_nf4: not what the model was trained with(.|\n)*{told}"):
        round_trip.check_files(folder, chats)


def test_a_layer_of_zeros_breaks_the_gate(trained: Trained, tmp_path: Path) -> None:
    def zeros(reader: GGUFReader) -> None:
        next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight").data[:] = 0

    damaged = copied(trained.scratch / "export" / f"{NAME}-F16.gguf", tmp_path, zeros)
    written = [writing.Written(Format.gguf_f16, damaged)]
    rows = records.read(trained.splits / "test.parquet")[:3]
    p = params()
    with pytest.raises(GateError, match=r"gguf_f16: mean KL .* at most 0.001(.|\n)*export.max_kl"):
        measuring.measure(written, {}, trained, rows, {"tuned": {}}, p=p.export, e=p.evaluate, n=NUMERICS)


def test_answers_that_do_not_stop_where_the_tuned_model_did_break_the_gate(tmp_path: Path) -> None:
    written = [writing.Written(Format.gguf_q8_0, tmp_path)]
    figures = {"export/gguf_q8_0/kl/mean": 0.0}
    with pytest.raises(GateError, match=r"gguf_q8_0: ends 0% of the answers .* at least 90%"):
        measuring.gate(written, figures | {"export/gguf_q8_0/stopped_as_tuned": 0.0}, params().export)
    measuring.gate(written, figures, params().export)  # nothing to compare with is no evidence


def test_a_modelfile_that_is_not_the_files_breaks_the_gate(trained: Trained) -> None:
    file = trained.scratch / "export" / f"{NAME}-Q8_0.gguf"
    context = measuring.context(trained.merged)
    modelfile.check(file, ["<|im_end|>"], context)
    with pytest.raises(GateError, match=r"stop '<\|im_end\|>' of the file is none of \['</s>'\]"):
        modelfile.check(file, ["</s>"], context)
    with pytest.raises(GateError, match=rf"num_ctx 7, llama.context_length of the file is {context}"):
        modelfile.check(file, ["<|im_end|>"], 7)


def test_a_format_that_cannot_be_written_here_is_named_with_the_reason(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = EXPORTERS[Format.bnb_nf4]
    monkeypatch.setattr(exporter, "absent", lambda: "no bitsandbytes: type make env", raising=False)
    only = replace(trained, export=params(formats=[Format.bnb_nf4]).export)
    assert writing.write_formats(only, tmp_path / "new") == ([], {"bnb_nf4": "no bitsandbytes: type make env"})


def test_sizes_count_quantized_layers_at_their_bits_and_the_rest_at_sixteen(trained: Trained) -> None:
    model = models.load_tuned(trained.base, trained.adapter, NUMERICS, dense=True)
    count, bits = measuring.quantized_bits(model, NUMERICS)
    assert bits == pytest.approx(4.127, abs=1e-3)  # QLoRA, arXiv:2305.14314, sec. 3: 0.127 bits for scales
    linear = sum(p.numel() for n, p in model.get_base_model().named_parameters() if n.endswith("base_layer.weight"))
    assert count == linear


def test_the_head_of_a_changed_file_is_read_anew(trained: Trained, tmp_path: Path) -> None:
    whole = trained.scratch / "export" / f"{NAME}-Q8_0.gguf"
    file = copied(whole, tmp_path, lambda reader: None)
    assert gguf_weights.read(file).fields["tokenizer.ggml.eos_token_id"].contents() == END
    copied(whole, tmp_path, another_stop)
    assert gguf_weights.read(file).fields["tokenizer.ggml.eos_token_id"].contents() == 7
