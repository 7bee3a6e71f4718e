"""make advise: which rule decides, at its thresholds, and what the metrics of a run come to."""

from dataclasses import replace
from pathlib import Path

import pytest

from commands import advise as command
from stages.lib import files
from stages.lib.experiments import advice
from stages.lib.experiments.advice import Task

TASK = Task("t", rows=200, available=200, measure="field_f1", base=0.1, fewshot=0.4)


@pytest.mark.parametrize(
    ("changes", "do", "reason"),
    [
        ({"rows": 49}, "prompt", "49 good rows to train on, fewer than 50"),
        ({"rows": 50}, "prompt", "50 good rows to train on, 500 are wanted to fine-tune"),
        ({"rows": 500}, "fine-tune", "500 teach format and style"),
        ({"rows": 5000, "changes": True}, "retrieve", "its answers change"),
        ({"rows": 5000, "base": 0.9}, "prompt", "scores 0.90 as it is"),
        ({"rows": 5000, "fewshot": 0.95}, "prompt", "with examples it scores 0.95"),
        ({"gain": (0.1, 0.3)}, "fine-tune", "measured: tuned less the base with examples +0.10 to +0.30"),
        ({"rows": 5000, "gain": (-0.3, -0.1)}, "prompt", "measured: tuned less the base with examples -0.30 to -0.10"),
        ({"gain": (-0.1, 0.3)}, "prompt", "500 are wanted to fine-tune"),
        ({"rows": 500, "gain": (-0.1, 0.3)}, "fine-tune", "500 teach format and style"),
        ({"measure": None, "base": None, "fewshot": None}, "prompt", "500 are wanted"),
    ],
    ids=str,
)
def test_the_first_rule_that_applies_decides(changes: dict[str, object], do: str, reason: str) -> None:
    found = advice.advise(replace(TASK, **changes))
    assert found.do == do
    assert reason in found.reasons[0]


@pytest.mark.parametrize("rows", [200, 500])
def test_a_measurement_that_does_not_decide_is_said(rows: int) -> None:
    reasons = advice.advise(replace(TASK, rows=rows, gain=(-0.1, 0.3))).reasons
    assert "measured: tuned less the base with examples -0.10 to +0.30 field_f1: no gain shown" in reasons


def test_rows_that_are_there_but_capped_are_named() -> None:
    reasons = advice.advise(replace(TASK, rows=40, available=3000)).reasons
    assert "about 3,000 valid rows are there, enough: lift split.max_rows" in reasons


def test_a_form_that_examples_do_not_keep_is_named() -> None:
    reasons = advice.advise(replace(TASK, form={"json_valid": 0.95, "json_schema": 0.4})).reasons
    assert any("the form is not kept (json_schema 0.40)" in reason for reason in reasons)


SPLIT = {
    "rows/in": 1000, "rows/train/style": 600, "rows/train/facts": 30, "split/share/train": 0.8,
    "duplicates/exact": 100, "duplicates/near": 0, "duplicates/semantic": 0,
}  # fmt: skip


@pytest.mark.usefixtures("in_tmp")
def test_the_command_reads_metrics_and_ends_with_1_when_nothing_is_worth_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([]) == 2
    assert "metrics/prepare.json: not found" in capsys.readouterr().err
    files.write_json(Path("metrics/prepare.json"), {"rows/out/style": 1000, "rows/out/facts": 100})
    files.write_json(Path("metrics/dedup_split.json"), SPLIT)
    assert command.main([]) == 0
    assert "facts: prompt\n  30 good rows to train on, fewer than 50\n  about 72 valid rows" in capsys.readouterr().out
    assert command.main(["--changing", "style"]) == 1
    assert "style: retrieve" in capsys.readouterr().out
    assert command.main(["--changing", "prices"]) == 2
    assert "found prices, expected tasks of the data: facts, style" in capsys.readouterr().err


def test_scores_come_from_the_first_measure_that_a_task_has() -> None:
    scores = {f"test/style/rouge_l/{arm}": score for arm, score in (("base", 0.1), ("fewshot", 0.2), ("tuned", 0.6))}
    bounds = {
        "test/style/rouge_l/low_fewshot": 0.3,
        "test/style/rouge_l/high_fewshot": 0.5,
        "test/style/stops/fewshot": 0.5,
    }
    (_, found) = advice.tasks({}, SPLIT, scores | bounds)
    assert (found.measure, found.base, found.fewshot, found.tuned, found.gain) == ("rouge_l", 0.1, 0.2, 0.6, (0.3, 0.5))
    assert found.form == {"stops": 0.5}
