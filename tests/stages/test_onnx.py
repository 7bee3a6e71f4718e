"""ONNX Runtime GenAI int4: written apart, measured and asked in its own runtime, skipped clearly where it is absent."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from stages.lib import apart, chat, fidelity, files, models
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import EXPORTERS, onnx
from stages.lib.export.formats.exporter import Request, Trained
from stages.lib.schema.export import Export, Format
from tests.conftest import ROOT
from tests.exported import MERGE, NUMERICS

TURNS = [
    {"role": "user", "content": "What is 2 + 2?  One word."},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": 'And as {"sum": 4}?\n\nÜmläute, 漢字.'},
]
ROWS = [[1, 20, 30, 40, 50], [1, 33, 70]]
INT4 = EXPORTERS[Format.onnx_int4]
needs_runtime = pytest.mark.skipif(INT4.absent() is not None, reason=INT4.absent() or "")


def a_trained(merged: Path, scratch: Path) -> Trained:
    scratch.mkdir(parents=True, exist_ok=True)
    export = Export(**yaml.safe_load((ROOT / "params.yaml").read_text())["export"])
    return Trained("tiny", merged, merged, merged, merged, scratch, export, NUMERICS, MERGE)


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Trained]]:
    """The tiny model as a folder of ONNX, made once; the test may change its copy."""
    whole = tmp_path_factory.mktemp("onnx") / "onnx_int4"
    trained = a_trained(tiny_model_dir, whole.parent / "scratch")
    INT4.write(trained, whole)

    def copy() -> tuple[Path, Trained]:
        folder = tmp_path_factory.mktemp("copy") / whole.name
        shutil.copytree(whole, folder)
        return folder, trained

    return copy


def distance(folder: Path, trained: Trained) -> float:
    expected = fidelity.reference(fidelity.of(models.load_dense(trained.merged, NUMERICS)), ROWS)
    return fidelity.compare(expected, INT4.log_probs(folder, trained)).kl_mean


def test_where_the_runtime_is_absent_it_says_so_and_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnx_ir" else importlib.util.find_spec("json"))
    assert INT4.absent() is not None
    assert "found no onnx_ir, expected pyproject's extra `onnx`: type `uv pip install" in str(INT4.absent())


def test_an_architecture_the_builder_does_not_know_names_the_key(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(what: str, *arguments: str, **environment: str) -> None:
        raise ExternalError(f"{what}: NotImplementedError: The {tiny_model_dir} model is not currently supported.")

    monkeypatch.setattr(apart, "run", refuse)
    with pytest.raises(ModelError, match=r"does not know this architecture, found LlamaForCausalLM.*export\.formats"):
        INT4.write(a_trained(tiny_model_dir, tmp_path / "scratch"), tmp_path / "onnx_int4")


@pytest.mark.slow
@needs_runtime
def test_the_builder_itself_refuses_an_architecture_in_those_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config = files.read_json(model / "config.json")
    files.write_json(model / "config.json", config | {"architectures": ["OtherForCausalLM"]})
    with pytest.raises(ModelError, match=r"found OtherForCausalLM.*export\.formats"):
        INT4.write(a_trained(model, tmp_path / "scratch"), tmp_path / "onnx_int4")


@pytest.mark.slow
@needs_runtime
def test_it_is_close_to_the_model_and_small(written: Callable[[], tuple[Path, Trained]]) -> None:
    folder, trained = written()
    assert 0 < distance(folder, trained) < 0.1
    weights = sum(weight.numel() for weight in models.load_dense(trained.merged, NUMERICS).parameters())
    size = INT4.size(folder, weights)
    assert size.fallback_tensors == 0
    assert size.bits_per_weight < 16


@pytest.mark.slow
@needs_runtime
def test_a_second_one_has_the_same_bytes_with_other_threads(
    written: Callable[[], tuple[Path, Trained]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained = written()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    again = tmp_path / "a b" / "onnx_int4"
    INT4.write(trained, again)
    assert {file.name: files.sha256(file) for file in folder.iterdir()} == {
        file.name: files.sha256(file) for file in again.iterdir()
    }


@pytest.mark.slow
@needs_runtime
def test_its_runtime_writes_chats_as_training_did_and_stops(written: Callable[[], tuple[Path, Trained]]) -> None:
    folder, trained = written()
    tokenizer = chat.load_tokenizer(trained.merged)
    stops = chat.stop_ids(tokenizer, trained.merged)
    prompts = [chat.prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("a fox", "a dog")]
    session = INT4.ask(folder, Request([TURNS], prompts, stops, 6), trained)
    assert session.tokens == [chat.prompt_ids(tokenizer, TURNS)]
    assert session.rendered == [chat.render(tokenizer, TURNS, add_generation_prompt=True)]
    for answer in session.answers:
        ids = answer.ids
        log_probs = INT4.log_probs(folder, trained)([*answer.prompt, *ids], len(answer.prompt))
        assert ids == log_probs.argmax(dim=-1).tolist()
        assert answer.top[0][ids[0]] == pytest.approx(log_probs[0, ids[0]].item(), abs=1e-3)

    first = session.answers[0].ids[0]
    config = files.read_json(folder / "genai_config.json")
    config["model"]["eos_token_id"] = first
    files.write_json(folder / "genai_config.json", config)
    stopped = INT4.ask(folder, Request([], prompts[:1], [first], 6), trained).answers[0]
    assert (stopped.ids, stopped.stopped) == ([], True)


@pytest.mark.slow
@needs_runtime
def test_a_matrix_of_zeros_is_seen(written: Callable[[], tuple[Path, Trained]]) -> None:
    folder, trained = written()
    import onnx as library

    graph = library.load(folder / "model.onnx", load_external_data=False).graph
    (scales,) = (one for one in graph.initializer if "layers.1.mlp.down_proj" in one.name and "scale" in one.name)
    place = {entry.key: entry.value for entry in scales.external_data}
    with (folder / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(bytes(int(place["length"])))
    assert distance(folder, trained) > 2 * distance(written()[0], trained)


@pytest.mark.slow
@needs_runtime
def test_another_template_shows_in_what_the_runtime_writes(written: Callable[[], tuple[Path, Trained]]) -> None:
    folder, trained = written()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_end|>"))
    session = INT4.ask(folder, Request([TURNS], [[1, 2, 3]], [2], 2), trained)
    assert session.tokens != [chat.prompt_ids(chat.load_tokenizer(trained.merged), TURNS)]


@pytest.mark.slow
@needs_runtime
def test_a_folder_without_its_weights_is_one_message(written: Callable[[], tuple[Path, Trained]]) -> None:
    folder, trained = written()
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"ONNX Runtime GenAI does not load it.*quantize_export"):
        INT4.log_probs(folder, trained)
