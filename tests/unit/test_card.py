"""The model card, which is written to be published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from stages.lib.bootstrap import Difference
from stages.lib.export import card
from stages.lib.export.ladder import Rung
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.base_model import Source as ModelSource
from stages.lib.schema.numerics import Quantization
from tests.data_settings import settings
from tests.exported import NUMERICS

BASE = BaseModel(ModelSource.package, "maker/toy", None, "toy==1.0", "toy.gguf", "0" * 64, "mit", "https://x.org")
FACTS = card.Facts(
    name="toy-tuned",
    base=BASE,
    source={"origin": "toy==1.0", "revision": "0", "weights": "as published"},
    data=settings(path="/home/ann/secret/my.jsonl"),
    adapter={"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "target_modules": ["q_proj"]},
    trained={"method": "lora"},
    numerics=NUMERICS,
    confidence=0.95,
    evaluated={},
    metrics={},
    rungs=[Rung("merged", {"kl/mean": 0.1, "top1": 0.9}, {})],
    files={},
    skipped={},
    recommended=None,
    stops=["<|im_end|>"],
    has_modelfile=False,
)


def written(folder: Path, **changes: Any) -> str:
    card.write(folder / "README.md", replace(FACTS, **changes))
    return (folder / "README.md").read_text()


def test_the_card_names_the_users_file_but_not_the_folders_above_it(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "A file of the user's own, `my.jsonl`." in text
    assert "ann" not in text


def test_the_card_says_how_the_base_was_held_and_the_rank_that_was_configured(tmp_path: Path) -> None:
    pissa = written(
        tmp_path,
        trained={"method": "pissa"},  # stored at twice the rank
        numerics=replace(NUMERICS, quantization=Quantization.int8),
    )
    assert "PiSSA adapters of rank 4 (alpha 8, dropout 0) on q_proj" in pissa
    assert "frozen in 8-bit integers" in pissa
    assert "LoRA adapters of rank 8 (alpha 16" in written(tmp_path)


def test_the_card_tells_how_to_run_only_what_is_there(tmp_path: Path) -> None:
    assert "vllm" not in written(tmp_path)
    gguf = written(tmp_path, files={"gguf_q8_0": "toy-Q8_0.gguf"}, recommended="toy-Q8_0.gguf", has_modelfile=True)
    assert "llama-cli -m toy-Q8_0.gguf" in gguf
    assert "ollama create toy-tuned -f Modelfile" in gguf
    assert "AutoModelForCausalLM" not in gguf
    folder = written(tmp_path, files={"safetensors": "safetensors"})
    assert "vllm serve ./safetensors" in folder
    assert 'folder = "safetensors"' in folder
    assert "llama-cli" not in folder


def test_the_card_names_what_was_left_out_and_why(tmp_path: Path) -> None:
    assert "not written: w4a16 (no llmcompressor)." in written(tmp_path, skipped={"w4a16": "no llmcompressor"})


def test_the_model_index_holds_the_tuned_models_scores_on_its_own_test_split(tmp_path: Path) -> None:
    rung = Rung("base", {}, {"a/b/field_f1": Difference(-0.5, -0.6, -0.4)})
    written(tmp_path, rungs=[*FACTS.rungs, rung], evaluated={"test/a/b/field_f1/tuned": 0.75})
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("local, task a/b", "field_f1", 0.75)
    assert not result.verified


def test_the_model_index_keeps_the_tasks_apart(tmp_path: Path) -> None:
    same = {f"{task}/rouge_l": Difference(0.0, 0.0, 0.0) for task in ("one", "two")}
    evaluated = {"test/one/rouge_l/tuned": 0.5, "test/two/rouge_l/tuned": 0.25}
    written(tmp_path, evaluated=evaluated, rungs=[*FACTS.rungs, Rung("gguf_q8_0", {}, same)])
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {(one.dataset_config, one.metric_value) for one in found} == {("one", 0.5), ("two", 0.25)}


def test_the_licence_of_packaged_data_is_the_one_they_declare(tmp_path: Path) -> None:
    text = written(tmp_path, data=settings(source="python_docs", packages=["numpy"]))
    assert "numpy: BSD-3-Clause" in text
    assert "not recorded" in written(tmp_path)
