"""Real questions with an official split: the test file never meets training, and training helps to answer it."""

import csv
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import params
from stages import dedup_split, evaluate, prepare, qlora_train, tokenize_pack
from stages.lib import config, engine, files, model_folder, records
from stages.lib.schema.prompt import Use
from stages.lib.schema.runtime import Engine, Runtime
from tests.conftest import ROOT

BANKING77 = ROOT.parent / "shared/data/banking77"
INTENTS, TRAINED, ASKED = 8, 60, 15  # the most frequent intents, and rows of each
LONG = 14  # words of the questions that are planted: such long ones are in no other row by chance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not BANKING77.is_dir(), reason=f"{BANKING77} is not there"),
]


class Split(NamedTuple):
    folder: Path
    planted: list[str]  # questions of the test file, in rows 2, 3 and 4 of the training file too


def read(name: str) -> list[list[str]]:
    with (BANKING77 / name).open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """What the stages make of both files, with three rows of the test file planted in the training file."""
    folder = tmp_path_factory.mktemp("banking77")
    test, train = read("test.csv"), read("train.csv")
    copied, shouted, quoted = [row for row in test if len(row[0].split()) >= LONG and "\n" not in row[0]][:3]
    planted = [
        copied,
        [shouted[0].upper().replace(",", " ;"), shouted[1]],
        [f"Hi team! {quoted[0]} Thanks.", "another_label"],
    ]
    for name, rows in (("train.csv", planted + train), ("test.csv", test)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([["text", "category"], *rows])
    (folder / "data/benchmarks").mkdir(parents=True)
    given = [
        "data.source=local",
        f"data.path={folder}",
        "data.format=classification",
        "++data.columns={text: text, label: category}",
        "++data.sources={train: {path: train.csv, official: train}, test: {path: test.csv, official: test}}",
        "split.max_rows={}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(engine, "_runtime", Runtime(None, 1, Engine.local, None, "warning", None, 2))
        prepare.main(config.load(prepare.Params, given, ROOT / "params.yaml"))
        dedup_split.main(config.load(dedup_split.Params, given, ROOT / "params.yaml"))
    return Split(folder, [row[0] for row in (copied, shouted, quoted)])


def questions(made: Split, split: str) -> dict[str, str]:
    """Question -> the file it came from, of the rows of a split."""
    rows = records.read(made.folder / f"data/splits/{split}.parquet")
    return {bare(row["messages"][-2]["content"].partition("\n\n")[2]): row["source"] for row in rows}


def bare(question: str) -> str:
    """A question without case and punctuation."""
    return " ".join(re.findall(r"[\w-]+", question.casefold()))


def test_every_question_of_the_test_file_is_in_the_test_split_and_nothing_else(made: Split) -> None:
    assert questions(made, "test").keys() == {bare(question) for question, _ in read("test.csv")}
    assert set(questions(made, "test").values()) == {"test"}


def test_no_question_of_the_test_file_is_in_train_or_validation(made: Split) -> None:
    test = questions(made, "test").keys()
    train, validation = questions(made, "train"), questions(made, "validation")
    assert set(train.values()) | set(validation.values()) == {"train"}
    assert test.isdisjoint(train)
    assert test.isdisjoint(validation)


def test_validation_is_taken_out_of_the_training_file(made: Split) -> None:
    metrics = files.read_json(made.folder / "metrics/dedup_split.json")
    share = metrics["rows/validation"] / (metrics["rows/validation"] + metrics["rows/train"])
    assert share == pytest.approx(0.08, abs=0.01)


def test_planted_copies_of_test_rows_are_found_and_removed_and_every_row_is_accounted_for(made: Split) -> None:
    prepared = records.read(made.folder / "data/prepared")
    line = {row["meta"]["where"]: row["id"] for row in prepared}
    test = {row["id"]: row for row in records.read(made.folder / "data/splits/test.parquet")}
    dropped = files.read_rows(made.folder / "data/splits/dropped.parquet")
    found = {row["id"]: row for row in dropped if row["source"] == "train"}
    removed = [found[line[f"train/train.csv:{number}"]] for number in (2, 3, 4)]
    for row, question in zip(removed, made.planted, strict=True):
        assert bare(question) in bare(test[row["kept_id"]]["messages"][-2]["content"])
    assert [row["reason"] for row in removed] == ["exact", "exact", "contaminated"]
    metrics = files.read_json(made.folder / "metrics/dedup_split.json")
    kept = sum(metrics[f"rows/{split}"] for split in ("train", "validation", "test"))
    assert metrics["rows/in"] == kept + len(dropped) == len(read("train.csv")) + len(read("test.csv")) + 3


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, default_base: Path) -> dict[str, float]:
    """Metrics of evaluate after three epochs over a few intents, by conf/experiment/banking77.yaml."""
    folder = tmp_path_factory.mktemp("few_intents")
    frequent = {label for label, _ in Counter(label for _, label in read("train.csv")).most_common(INTENTS)}
    for name, most in (("train.csv", TRAINED), ("test.csv", ASKED)):
        rows = defaultdict(list)
        for row in read(name):
            rows[row[1]].append(row)
        with (folder / name).open("w", newline="") as file:
            chosen = [row for label in sorted(frequent) for row in rows[label][:most]]
            csv.writer(file).writerows([["text", "category"], *chosen])
    given = ["experiment=banking77", f"data.path={folder}", "split.validation_fraction=0.1", "train.epochs=3"]
    given += ["evaluate.max_rows={fewshot: 80}", "evaluate.general_text.package=null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        params.write(folder / "params.yaml", given)
        shutil.copytree(default_base, folder / "models/base")
        model_folder.settle_chat_template(folder / "models/base", "conf/prompt/chatml.jinja", Use.always)
        patch.chdir(folder)
        patch.setattr(engine, "_runtime", Runtime(None, 1, Engine.local, None, "warning", None, 2))
        Path("data/benchmarks").mkdir(parents=True)
        for stage in (prepare, dedup_split, tokenize_pack, qlora_train, evaluate):
            stage.main(config.load(stage.Params, [], Path("params.yaml")))
        return files.read_json(Path("metrics/evaluate.json"))


@pytest.mark.parametrize("baseline", ["base", "fewshot"])
def test_the_tuned_model_is_right_more_often_than_the_base_with_and_without_examples(
    answered: dict[str, float], baseline: str
) -> None:
    accuracy = "test/classification/accuracy"
    assert answered[f"{accuracy}/tuned"] > answered[f"{accuracy}/{baseline}"]
    assert answered[f"{accuracy}/low{'' if baseline == 'base' else '_fewshot'}"] > 0
