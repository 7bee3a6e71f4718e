"""General text: what is read, how likely it is found, and that forgetting is seen."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from stages.lib import chat, general
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import GeneralText
from tests.evaluate_settings import settings

TEXT = GeneralText("scikit-learn", "sklearn/datasets/descr/*.rst", tokens=256, window=32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return chat.load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    return model


def test_windows_are_the_first_of_each_text_then_the_second_and_count_the_bytes_they_predict(tokenizer: Any) -> None:
    texts = {"b": "over a lazy dog " * 30, "a": "the quick brown fox " * 30, "c": "nothing"}
    found = general.windows(tokenizer, texts, GeneralText("x", "*", tokens=30, window=10))
    assert [window.name for window in found] == ["a:000000", "b:000000", "a:000010"]
    whole = tokenizer(texts["a"], add_special_tokens=False)["input_ids"]
    assert found[2].ids == whole[10:20]
    assert found[2].n_bytes == len(tokenizer.decode(whole[11:20]).encode())


@torch.inference_mode()
def test_a_window_is_as_likely_as_the_plain_model_finds_it_by_itself(tokenizer: Any, model: Any) -> None:
    windows = general.windows(tokenizer, general.texts(TEXT), TEXT)
    assert len(windows) == 8
    for window, nll in zip(windows, general.likelihoods(model, windows), strict=True):
        ids = torch.tensor([window.ids])
        assert nll == pytest.approx(model(ids, labels=ids).loss.item() * 31, rel=1e-5)


def test_what_training_did_to_general_text_is_the_tuned_model_against_the_base(
    tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = settings(general_text=vars(TEXT))
    windows = general.windows(tokenizer, general.texts(TEXT), TEXT)
    metrics = general.metrics(general.compare(model, tokenizer, p))
    assert math.log(metrics["general/perplexity/tuned"]) == pytest.approx(
        sum(general.likelihoods(model, windows)) / 31 / 8
    )
    with model.disable_adapter():
        base = sum(general.likelihoods(model, windows))
    assert math.log(metrics["general/perplexity/base"]) == pytest.approx(base / 31 / 8)
    assert metrics["general/perplexity/base"] != metrics["general/perplexity/tuned"]
    forgetful = iter([[60.0 + n for n in range(8)], [70.0 + n for n in range(8)]])  # first the base's
    monkeypatch.setattr(general, "likelihoods", lambda *_: next(forgetful))
    assert {line.verdict("base") for line in general.compare(model, tokenizer, p)} == {"worse"}


def test_a_package_that_is_not_there_is_named_with_its_key_and_none_measures_nothing(model: Any) -> None:
    assert general.texts(GeneralText(None, "*", 64, 32)) == {}
    with pytest.raises(DataError, match=r"general_text\.package: 'nonsense' is not installed"):
        general.texts(GeneralText("nonsense", "*", 64, 32))
    with pytest.raises(DataError, match=r"general_text\.files: no file of numpy matches 'x/\*\.rst'"):
        general.texts(GeneralText("numpy", "x/*.rst", 64, 32))
