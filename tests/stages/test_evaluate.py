"""evaluate: three arms on the same rows, figures and page from them, the same bytes every time."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.lib import files, records
from stages.lib.errors import DataError
from stages.lib.measures import OF_JSON, SCORES
from stages.lib.schema.numerics import Determinism, Device, Numerics, Quantization
from tests.evaluate_settings import settings

NUMERICS = Numerics(
    determinism=Determinism.strict,
    compute_dtype="float32",
    adapter_dtype="float32",
    device=Device.cpu,
    quantization=Quantization.nf4,
    double_quantization=True,
)
SETTINGS = settings(
    fewshot=2,
    batch_size=3,
    max_new_tokens=10,
    answer_margin=2,
    base_16bit=True,
    general_text={"package": "scikit-learn", "files": "sklearn/datasets/descr/iris.rst", "tokens": 64, "window": 32},
)


def row(number: int, task: str) -> dict:
    answer = json.dumps({"a": f"{number}"}) if task == "fields" else f"the fox {number}"
    turns = [{"role": "user", "content": f"the {task} of {number}"}, {"role": "assistant", "content": answer}]
    return records.make(turns, group=str(number), source=f"source {number % 2}", task=task)


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose B is not zero, so that tuned differs from base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.lib import models

    torch.manual_seed(3)
    model = get_peft_model(
        models.load_base(tiny_model_dir, NUMERICS), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(in_tmp: Path, tiny_model_dir: Path, adapter: Path) -> Path:
    shutil.copytree(tiny_model_dir, in_tmp / "models/base")
    shutil.copytree(adapter, in_tmp / "models/adapter")
    files.write_json(Path("models/base/source.json"), {"id": "test/tiny"})
    counts = {"duplicates/exact": 1, "duplicates/near": 2, "rows/in": 24, "rows/train": 8}
    files.write_json(Path("metrics/dedup_split.json"), counts)
    files.write_csv(Path("plots/train.csv"), [{"step": step, "loss": 2 - step, "val_loss": 2} for step in (0, 1)])
    for split, numbers in (("train", range(4)), ("test", range(10, 15))):
        rows = [row(number, task) for number in numbers for task in ("fields", "words")]
        records.write(Path(f"data/splits/{split}.parquet"), rows)
    return in_tmp


def test_each_row_is_answered_by_three_arms_and_the_base_is_the_untouched_one(workplace: Path) -> None:
    from stages.lib import arms, chat, models, scoring

    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    rows = files.read_rows(Path("reports/evaluation/predictions.parquet"))
    assert [(found["arm"], found["id"]) for found in rows] == sorted((found["arm"], found["id"]) for found in rows)
    assert len(rows) == 3 * 10
    prompts = {arm: {found["id"]: found["prompt_sha"] for found in rows if found["arm"] == arm} for arm in arms.ARMS}
    assert prompts["base"] == prompts["tuned"] != prompts["fewshot"]
    assert all(found["field_f1"] is None for found in rows if found["task"] == "words")
    assert all(found["field_f1"] is not None for found in rows if found["task"] == "fields")

    base = Path("models/base")
    tokenizer = chat.load_tokenizer(base)
    asked = arms.questions(tokenizer, sorted(records.read(Path("data/splits/test.parquet")), key=lambda r: r["id"]))
    alone = scoring.answer_likelihoods(
        models.load_base(base, NUMERICS), [q.prompt for q in asked], [q.answer for q in asked], batch_size=1
    )
    nll = {arm: [found["nll"] for found in rows if found["arm"] == arm] for arm in arms.ARMS}
    assert nll["base"] == pytest.approx([likelihood.nll for likelihood in alone], rel=1e-4)
    assert nll["tuned"] != pytest.approx(nll["base"], rel=1e-2)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(question.answer[-1] == end_of_turn for question in asked)


def test_metrics_are_flat_numbers_per_task_measure_and_figure(workplace: Path) -> None:
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    metrics = files.read_json(Path("metrics/evaluate.json"))
    figures = {"base", "fewshot", "tuned", "delta", "low", "high", "delta_fewshot", "low_fewshot", "high_fewshot"}
    for task, measures in (("fields", set(OF_JSON)), ("words", set())):
        expected = measures | {"loss", "perplexity", "bits_per_byte", "stops"} | set(SCORES) - {*OF_JSON, "accuracy"}
        found = {tuple(name.split("/")[2:]) for name in metrics if name.startswith(f"test/{task}/")}
        extra = {("loss", "base_16bit"), ("perplexity", "base_16bit")}
        assert found == {(measure, figure) for measure in expected for figure in figures} | extra


def test_texts_are_scored_and_unwanted_answers_are_counted_and_left_out(workplace: Path) -> None:
    texts = {
        split: [
            records.make(kind="text", text=f"{number} quick foxes", group="", source="s", task="text")
            for number in numbers
        ]
        for split, numbers in (("train", range(3)), ("test", range(5, 7)))
    }
    unwanted = records.make(
        row(20, "words")["messages"], kind="unpaired", label="false", group="", source="s", task="w"
    )
    records.write(Path("data/splits/train.parquet"), texts["train"])
    records.write(Path("data/splits/test.parquet"), [*texts["test"], unwanted])
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    metrics = files.read_json(Path("metrics/evaluate.json"))
    assert (metrics["rows/test"], metrics["rows/unusable/unwanted"]) == (2, 1)
    assert metrics["test/text/loss/base"] > 0
    assert "foxes" in Path("reports/evaluation/index.html").read_text()


def test_classifications_are_answered_by_the_likelihood_of_their_labels_and_on_fewer_rows_where_asked(
    workplace: Path,
) -> None:
    from stages.lib import arms, chat, models, scoring

    def labelled(number: int) -> dict:
        label = ("fox", "lazy dog")[number % 2]
        turns = [{"role": "user", "content": f"which is {number}"}, {"role": "assistant", "content": label}]
        return records.make(turns, group=str(number), source="s", task="animal", label=label)

    records.write(Path("data/splits/train.parquet"), [labelled(number) for number in range(4)])
    records.write(Path("data/splits/test.parquet"), [labelled(number) for number in range(10, 16)])
    few = replace(SETTINGS, max_rows={"fewshot": 4}, base_16bit=False)
    evaluate.main(evaluate.Params(few, NUMERICS))
    rows = files.read_rows(Path("reports/evaluation/predictions.parquet"))
    assert Counter(found["arm"] for found in rows) == {"base": 6, "fewshot": 4, "tuned": 6}
    tokenizer = chat.load_tokenizer(Path("models/base"))
    asked = {row["id"]: row for row in records.read(Path("data/splits/test.parquet"))}
    tuned = [found for found in rows if found["arm"] == "tuned"]
    questions = {
        label: arms.questions(
            tokenizer,
            [
                {**asked[found["id"]], "messages": [*asked[found["id"]]["messages"][:-1], answered(label)]}
                for found in tuned
            ],
        )
        for label in ("fox", "lazy dog")
    }
    model = models.load_tuned(Path("models/base"), Path("models/adapter"), NUMERICS)
    nll = {
        label: [
            each.nll
            for each in scoring.answer_likelihoods(model, [q.prompt for q in of], [q.answer for q in of], batch_size=1)
        ]
        for label, of in questions.items()
    }
    for place, found in enumerate(tuned):
        assert found["answer"] == found["predicted"] == min(nll, key=lambda label: nll[label][place])
        assert found["nll"] == pytest.approx(nll[found["label"]][place], rel=1e-4)
        assert (found["stops"], found["new_tokens"], found["rouge_l"]) == (None, None, None)
        assert found["accuracy"] == (found["predicted"] == found["label"])
    metrics = files.read_json(Path("metrics/evaluate.json"))
    assert metrics["test/animal/accuracy/tuned"] == sum(found["accuracy"] for found in tuned) / 6
    assert 0 <= metrics["test/animal/macro_f1/tuned"] <= 1


def answered(label: str) -> dict:
    return {"role": "assistant", "content": label}


def test_another_adapter_is_one_more_arm_and_a_task_out_of_distribution_sees_examples_of_its_task(
    workplace: Path,
) -> None:
    from stages.lib import others

    rows = [row(number, "words") | {"task": "words_ood"} for number in range(20, 23)]
    records.write(Path("data/splits/test.parquet"), rows)
    same = {"path": "models/adapter", "sha256": others.sha256(Path("models/adapter"))}
    evaluate.main(evaluate.Params(replace(SETTINGS, others={"again": same}, base_16bit=False), NUMERICS))
    predicted = files.read_rows(Path("reports/evaluation/predictions.parquet"))
    by_arm = {arm: [found for found in predicted if found["arm"] == arm] for arm in ("again", "tuned", "fewshot")}
    assert [found["nll"] for found in by_arm["again"]] == [found["nll"] for found in by_arm["tuned"]]
    assert [found["answer"] for found in by_arm["again"]] == [found["answer"] for found in by_arm["tuned"]]
    assert len(by_arm["fewshot"]) == 3
    metrics = files.read_json(Path("metrics/evaluate.json"))
    assert metrics["test/words_ood/loss/delta_again"] == 0
    assert metrics["general/perplexity/base"] > 1


def test_two_runs_give_the_same_bytes(workplace: Path) -> None:
    outputs = [
        Path("reports/evaluation/predictions.parquet"),
        Path("reports/evaluation/index.html"),
        Path("metrics/evaluate.json"),
    ]
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    first = [files.sha256(path) for path in outputs]
    shutil.rmtree("runs")  # where the base's answers are kept
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    assert [files.sha256(path) for path in outputs] == first


def test_the_next_experiment_on_the_same_base_lets_the_tuned_model_answer_alone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.lib import arms

    asked: list[str] = []
    predict = arms.predict

    def counted(arm: arms.Arm, *rest: Any) -> arms.Predicted:
        asked.append(arm.name)
        return predict(arm, *rest)

    monkeypatch.setattr(arms, "predict", counted)
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    first = files.sha256(Path("reports/evaluation/predictions.parquet"))
    (workplace / "plots/train.csv").write_text("step,loss,val_loss\n0,3,3\n")  # another training
    evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    assert asked == ["base", "fewshot", "tuned", "tuned"]
    assert files.sha256(Path("reports/evaluation/predictions.parquet")) == first
    evaluate.main(evaluate.Params(replace(SETTINGS, fewshot=1), NUMERICS))
    evaluate.main(evaluate.Params(SETTINGS, replace(NUMERICS, determinism=Determinism.loose)))
    assert asked[4:] == ["base", "fewshot", "tuned"] * 2


def test_a_test_split_without_rows_is_one_message_and_nothing_is_written(workplace: Path) -> None:
    records.write(Path("data/splits/test.parquet"), [])
    with pytest.raises(DataError, match=r"holds no row to evaluate on.*expected at least one.*split\.test_fraction"):
        evaluate.main(evaluate.Params(SETTINGS, NUMERICS))
    assert not Path("reports").exists()
