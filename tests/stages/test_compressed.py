"""compressed-tensors for vLLM: written and measured in llmcompressor's environment, skipped clearly without it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stages.lib import apart, chat, fidelity, files, models, records
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats import EXPORTERS, compressed
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
W4A16, W8A8 = EXPORTERS[Format.compressed_w4a16], EXPORTERS[Format.compressed_w8a8]
needs_environment = pytest.mark.skipif(W8A8.absent() is not None, reason=W8A8.absent() or "")
Copy = Callable[[Format], Path]


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("compressed")
    rows = [
        records.make(
            [{"role": "user", "content": f"the fox {i} jumps"}, {"role": "assistant", "content": f"a lazy dog {i}"}],
            group=f"g{i}",
            source="tests",
            task="summary",
        )
        for i in range(6)
    ]
    records.write(folder / "splits/train.parquet", rows)
    (folder / "scratch").mkdir()
    export = Export(**yaml.safe_load((ROOT / "params.yaml").read_text())["export"])
    model = tiny_model_dir
    return Trained("tiny", model, model, model, folder / "splits", folder / "scratch", export, NUMERICS, MERGE)


@pytest.fixture(scope="module")
def written(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy of a format of the tiny model, which is written once."""
    whole = tmp_path_factory.mktemp("whole")

    def copy(form: Format) -> Path:
        if not (whole / form).exists():
            EXPORTERS[form].write(trained, whole / form)
        return Path(shutil.copytree(whole / form, tmp_path_factory.mktemp("copy") / form))

    return copy


def distance(form: Format, folder: Path, trained: Trained) -> float:
    expected = fidelity.reference(fidelity.of(models.load_dense(trained.merged, NUMERICS)), ROWS)
    return fidelity.compare(expected, EXPORTERS[form].log_probs(folder, trained)).kl_mean


def test_without_its_environment_it_says_so_and_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert W4A16.absent() == (
        "found no .venv-llmcompressor, expected llmcompressor in an environment of its own: type `make env-vllm`"
    )
    (tmp_path / ".venv-llmcompressor/bin").mkdir(parents=True)
    (tmp_path / ".venv-llmcompressor/bin/python").touch()
    assert W4A16.absent() is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no group of 128, 64, 32 weights divides rows of [48]", r"no group of .* divides rows of \[48\]"),
        ("ValueError: Transformers does not recognize this architecture.", "does not know this architecture"),
    ],
)
def test_a_model_it_cannot_write_names_the_key(
    said: str, told: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(what: str, *arguments: str, **environment: str) -> None:
        raise ExternalError(f"{what}: the process ended with status 1. Its last lines:\n{said}")

    monkeypatch.setattr(apart, "run", refuse)
    with pytest.raises(
        ModelError, match=rf"{told}, found LlamaForCausalLM\. Leave compressed_w8a8 out of export\.form"
    ):
        W8A8.write(trained, tmp_path / "compressed_w8a8")


@pytest.mark.slow
@needs_environment
def test_both_are_close_to_the_model_and_small(trained: Trained, written: Copy) -> None:
    weights = sum(weight.numel() for weight in models.load_dense(trained.merged, NUMERICS).parameters())
    size = {form: EXPORTERS[form].size(written(form), weights).bits_per_weight for form in compressed.SCHEMES}
    assert size[Format.compressed_w4a16] < size[Format.compressed_w8a8] < 16
    assert 0 < distance(Format.compressed_w8a8, written(Format.compressed_w8a8), trained) < 1e-3
    assert 1e-6 < distance(Format.compressed_w4a16, written(Format.compressed_w4a16), trained) < 2e-2


@pytest.mark.slow
@needs_environment
def test_weights_of_eight_bits_meet_activations_of_eight_bits(trained: Trained, written: Copy) -> None:
    folder = written(Format.compressed_w8a8)
    rounded = distance(Format.compressed_w8a8, folder, trained)
    config = files.read_json(folder / "config.json")
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    files.write_json(folder / "config.json", config)
    assert distance(Format.compressed_w8a8, folder, trained) < rounded


@pytest.mark.slow
@needs_environment
def test_a_second_one_has_the_same_bytes_with_other_threads(
    trained: Trained, written: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for form in compressed.SCHEMES:
        again = tmp_path / "a b" / form
        EXPORTERS[form].write(trained, again)
        assert {file.name: files.sha256(file) for file in written(form).iterdir()} == {
            file.name: files.sha256(file) for file in again.iterdir()
        }


@pytest.mark.slow
@needs_environment
def test_chats_are_written_as_in_training_and_answers_follow_the_file(trained: Trained, written: Copy) -> None:
    folder = written(Format.compressed_w4a16)
    tokenizer = chat.load_tokenizer(trained.merged)
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": "a fox"}])
    session = W4A16.ask(folder, Request([TURNS], [prompt], chat.stop_ids(tokenizer, trained.merged), 6), trained)
    assert session.rendered == [chat.render(tokenizer, TURNS, add_generation_prompt=True)]
    assert session.tokens == [chat.prompt_ids(tokenizer, TURNS)]
    ids = session.answers[0].ids
    log_probs = W4A16.log_probs(folder, trained)([*prompt, *ids], len(prompt))
    assert ids == log_probs.argmax(dim=-1).tolist()

    config = json.loads((folder / "generation_config.json").read_text())
    files.write_json(folder / "generation_config.json", config | {"eos_token_id": ids[0]})
    stopped = W4A16.ask(folder, Request([], [prompt], [ids[0]], 6), trained).answers[0]
    assert (stopped.ids, stopped.stopped) == ([], True)


@pytest.mark.slow
@needs_environment
def test_a_matrix_of_zeros_is_seen(trained: Trained, written: Copy) -> None:
    folder = written(Format.compressed_w8a8)
    whole = distance(Format.compressed_w8a8, folder, trained)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight_scale"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert distance(Format.compressed_w8a8, folder, trained) > 10 * whole


@pytest.mark.slow
@needs_environment
def test_a_folder_without_its_weights_is_one_message(trained: Trained, written: Copy) -> None:
    folder = written(Format.compressed_w8a8)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"compressed_w8a8: cannot be loaded again"):
        distance(Format.compressed_w8a8, folder, trained)
