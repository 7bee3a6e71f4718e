"""make lm-eval: two harnesses beside each other; lm-eval itself, an extra, in the slow test."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import lm_eval
from stages import qlora_train
from stages.lib import adapters, arms, chat, config, models, records, scoring
from stages.lib.schema.numerics import Determinism, Device, Numerics, Quantization
from tests.conftest import ROOT

NF4 = Numerics(Determinism.strict, "float32", "float32", Device.cpu, Quantization.nf4, True)


def predicted(name: str, nll: float, n_tokens: int, answer: str = "a") -> dict[str, Any]:
    return {
        "id": name,
        "task": "t",
        "arm": "tuned",
        "nll": nll,
        "n_tokens": n_tokens,
        "answer": answer,
        "reference": "a",
    }


def test_losses_are_per_token_and_the_farthest_row_is_named_by_its_distance() -> None:
    rows = [predicted("one", 2.0, 4), predicted("two", 8.0, 6, answer="b")]
    (line,) = lm_eval.compared(rows, {"one": (2.4, True), "two": (8.0, False)}).values()
    assert line.loss == pytest.approx((1.0, 1.04))
    assert line.exact == (0.5, 0.5)
    assert line.farthest == pytest.approx(0.1)


def test_rows_that_only_one_of_them_scored_are_not_compared() -> None:
    rows = [predicted("one", 2.0, 4), predicted("two", 8.0, 6)]
    (line,) = lm_eval.compared(rows, {"one": (2.0, True)}).values()
    assert (line.rows, line.farthest) == (1, 0.0)


def test_the_tasks_text_gives_back_the_tokens_that_were_scored(tiny_model_dir: Path, in_tmp: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    rows = written()
    (text,) = lm_eval.as_text(tokenizer, {rows[0]["id"]})
    (question,) = arms.questions(tokenizer, rows[:1])
    assert tokenizer.encode(text["prompt"] + text["answer"]) == question.prompt + question.answer
    assert text["answer"].endswith("<|im_end|>")


def test_without_predictions_it_says_what_to_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert lm_eval.main() == 2
    assert "Run the stage evaluate" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_eval_finds_the_likelihoods_that_evaluate_found(
    tiny_model_dir: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(in_tmp / "cache"))
    shutil.copytree(tiny_model_dir, "models/base")
    shutil.copytree(ROOT / lm_eval.TASKS, lm_eval.TASKS)
    torch.manual_seed(0)
    lora = config.load(qlora_train.Params, path=ROOT / "params.yaml").lora
    model = adapters.add_adapter(models.load_base(tiny_model_dir, NF4), lora)
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapters.save(model, Path("models/adapter"))
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    asked = arms.questions(tokenizer, written())
    tuned = models.load_tuned(Path("models/base"), Path("models/adapter"), NF4, dense=True)
    scored = scoring.answer_likelihoods(
        tuned, [question.prompt for question in asked], [question.answer for question in asked], batch_size=3
    )
    rows = [predicted(question.row["id"], one.nll, one.n_tokens) for question, one in zip(asked, scored, strict=True)]
    p = config.load(lm_eval.Params, ["numerics.device=cpu"], path=ROOT / "params.yaml")
    found = lm_eval.scores(p, rows)
    (line,) = lm_eval.compared(rows, found).values()
    assert line.rows == len(rows) == 6
    assert line.farthest < lm_eval.TOLERANCE["float32"]


def written() -> list[dict[str, Any]]:
    """Six rows in data/splits/test.parquet, sorted by id."""
    rows = [
        records.make(
            [{"role": "user", "content": f"the fox {i}"}, {"role": "assistant", "content": "jumps over " * (i + 1)}],
            group=str(i), source="s", task="t",
        )
        for i in range(6)
    ]  # fmt: skip
    records.write(Path("data/splits/test.parquet"), rows)
    return sorted(records.read(Path("data/splits/test.parquet")), key=lambda row: str(row["id"]))
