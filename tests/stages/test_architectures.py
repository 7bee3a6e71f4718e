"""Nothing is Llama-only: other architectures, tokenizers and turns are read, trained, merged and exported alike."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import params
from stages import merge, quantize_export
from stages.lib import chat, config, files, gguf_weights, model_folder, overflow
from stages.lib.errors import ModelError
from stages.lib.export import modelfile
from tests import architectures, exported, tiny_training
from tests.conftest import ROOT, make_repo, run

TEXTS = (
    "the quick  brown fox",
    "x\n    12",
    "\n\n\nadd\n \nup",
    "\t\tÜmläute 漢字 🙂",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "   lead and trail   ",
)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.gemma3(tmp_path_factory.mktemp("gemma") / "base")


def test_a_sentencepiece_vocabulary_cuts_text_as_llama_cpp_does_with_the_file(gemma3: Path) -> None:
    from cyllama.llama import llama_cpp

    published = llama_cpp.LlamaModel(str(gemma3.parent / "gemma.gguf"), llama_cpp.LlamaModelParams())
    vocabulary = published.get_vocab()
    tokenizer = chat.load_tokenizer(gemma3)
    assert len(tokenizer) == vocabulary.n_vocab
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == list(vocabulary.tokenize(text, False, True)), text


def test_a_pretrained_model_gets_turns_with_one_bos_and_stops_at_their_end(gemma3: Path) -> None:
    tokenizer = chat.load_tokenizer(gemma3)
    ids = chat.prompt_ids(tokenizer, [{"role": "system", "content": "be kind"}, {"role": "user", "content": "add"}])
    assert tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\nbe kind<end_of_turn>\n<start_of_turn>user\nadd<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    stops = files.read_json(gemma3 / "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<eos>", "<end_of_turn>"]
    assert chat.stop_ids(tokenizer, gemma3) == stops
    assert model_folder.check(gemma3).vocabulary == len(tokenizer)


def test_ollama_sets_the_bos_itself_so_the_modelfile_has_none(gemma3: Path) -> None:
    found = modelfile.pieces(chat.load_tokenizer(gemma3), ["<end_of_turn>"])
    assert found is not None
    assert found.opening == {
        "system": "<start_of_turn>user\n",
        "user": "<start_of_turn>user\n",
        "assistant": "<start_of_turn>model\n",
    }


@pytest.mark.parametrize(("key", "value"), [("query_pre_attn_scalar", 168), ("layer_types", ["full_attention"] * 6)])
def test_a_gemma_that_llama_cpp_would_compute_otherwise_is_no_gguf(gemma3: Path, key: str, value: object) -> None:
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(gemma3, local_files_only=True)
    assert settings.query_pre_attn_scalar == settings.head_dim == 64  # which the file does not tell
    setattr(settings, key, value)
    with pytest.raises(ModelError, match=rf"{key} is .*, llama\.cpp takes .*export\.formats"):
        gguf_weights.load(gguf_weights.read(gemma3.parent / "gemma.gguf"), settings, torch.bfloat16)


def test_hidden_states_beyond_float16_are_told_before_anyone_gets_nan(gemma3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32, local_files_only=True)
    overflow.check(model, [[2, 20, 30, 40]], "float16")
    model.model.layers[3].post_feedforward_layernorm.weight.data.fill_(1e5)
    overflow.check(model, [[2, 20, 30, 40]], "bfloat16")
    with pytest.raises(
        ModelError, match=r"hidden states reach \d+,\d+.* float16 ends at 65,504.*merge\.dtype=bfloat16"
    ):
        overflow.check(model, [[2, 20, 30, 40]], "float16")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.MAKERS)
def test_an_architecture_is_trained_merged_and_exported(
    architecture: str, tmp_path_factory: pytest.TempPathFactory, in_tmp: Path
) -> None:
    base = architectures.MAKERS[architecture](tmp_path_factory.mktemp(architecture) / "base")
    trained, _ = tiny_training.fit(base, chat.load_tokenizer(base), tiny_training.TRAIN)
    assert trained.metrics["val/loss/tuned"] < trained.metrics["val/loss/base"]

    exported.make_inputs(base)
    overrides = [
        "merge.rows=4",
        "merge.dtype=bfloat16",
        "merge.max_kl=0.01",
        "merge.answers=4",
        "evaluate.max_new_tokens=8",
        "export.formats=[gguf_bf16,gguf_q8_0,gguf_q4_k_m,bnb_nf4]",
        "export.max_kl={gguf_bf16: 1.0e-3, gguf_q8_0: 1.0e-2}",
        "export.answers={gguf_q8_0: 6}",
        "export.rows=4",
        "export.probes=2",
        f"export.gguf_pre_tokenizer={architectures.PRE_TOKENIZER[architecture]}",
    ]
    Path("data/benchmarks").mkdir()  # where the composed defaults look for it
    params.write(Path("params.yaml"), overrides, ROOT / "conf")
    merge.main(config.load(merge.Params))
    quantize_export.main(config.load(quantize_export.Params))
    found = files.read_json(Path("metrics/quantize_export.json"))
    assert found["export/gguf_bf16/kl/mean"] < 1e-3
    assert found["export/gguf_bf16/round_trip/chats"] > 10


STAGES = "base_model prepare dedup_split tokenize_pack qlora_train evaluate merge quantize_export".split()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma_from_the_registry_goes_through_every_stage(tmp_path: Path) -> None:
    """The real package: needs a package registry; choosing it accepts the Gemma Terms of Use."""
    repository = make_repo(tmp_path / "repo")
    rows = [  # of a task that a dozen of steps can teach
        {"messages": [{"role": "user", "content": f"Double {i}."}, {"role": "assistant", "content": f"{2 * i}"}]}
        for i in range(100, 160)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    overrides = [
        "experiment=gemma3_270m",
        "data=local",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "dedup.threshold=1.0",
        "split.max_rows={}",
        "pack.max_tokens=64",
        "evaluate.fewshot=1",
        "evaluate.max_new_tokens=8",
        "export.formats=[gguf_q8_0]",
        "export.answers={gguf_q8_0: 4}",
        "export.probes=2",
    ]
    written = run(repository, sys.executable, "-m", "commands.params", *overrides)
    assert written.returncode == 0, written.stderr
    for stage in STAGES:
        done = run(repository, sys.executable, "-m", f"stages.{stage}", timeout=900)
        if "pip could not download it" in done.stderr:
            pytest.skip("no package registry within reach")
        assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"
    base, export = repository / "models/base", repository / "models/export"
    assert (export / "NOTICE").read_bytes() == (base / "NOTICE").read_bytes()
    assert (export / "BASE_LICENSE.html").read_bytes() == (base / "LICENSE.html").read_bytes()
    found = files.read_json(repository / "metrics/qlora_train.json")
    assert found["val/loss/tuned"] < found["val/loss/base"] / 2

    from cyllama.llama import llama_cpp

    vocabulary = llama_cpp.LlamaModel(str(next(export.glob("*Q8_0.gguf"))), llama_cpp.LlamaModelParams())
    tokenizer = chat.load_tokenizer(base)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == list(
            vocabulary.get_vocab().tokenize(text, False, True)
        ), text
