"""What the log of a point says about it."""

from pathlib import Path

import pytest

from stages.lib.experiments import running

CHAIN = ["base_model", "prepare", "qlora_train", "evaluate"]
FAILED = """Reproducing experiment 's-1'
Running stage 'qlora_train':
> python -m stages.qlora_train
  0%| 1/9
qlora_train: lora.target_modules: found ['no_such'], expected
layers of the model
ERROR: failed to reproduce 'qlora_train': failed to run: python -m stages.qlora_train, exited with {status}
"""


def test_a_failed_point_is_told_in_the_words_of_its_stage() -> None:
    status, reason = running.ending(FAILED.format(status=2))
    assert status == "failed"
    assert reason == "qlora_train: lora.target_modules: found ['no_such'], expected layers of the model"


@pytest.mark.parametrize(("code", "signal"), [(-9, "SIGKILL"), (137, "SIGKILL"), (143, "SIGTERM"), (-2, "SIGINT")])
def test_a_killed_stage_is_told_from_a_failed_one(code: int, signal: str) -> None:
    assert running.ending(FAILED.format(status=code)) == ("killed", f"qlora_train: {signal}")


def test_a_traceback_is_told_by_its_last_line() -> None:
    said = (
        "Traceback\n  File x\nRuntimeError: no\nERROR: failed to reproduce 'evaluate': failed to run: x, exited with 1"
    )
    assert running.ending(said) == ("failed", "RuntimeError: no")


def test_a_point_that_does_not_compose_is_told_in_the_words_of_hydra() -> None:
    said = "ERROR: Value 'abc' of type 'str' could not be converted to Integer\n    full_key: lora.r\n"
    status, reason = running.ending(said)
    assert status == "failed"
    assert reason.startswith("Value 'abc'")
    assert "lora.r" in reason


def test_a_log_that_just_ends_is_that_of_a_killed_dvc() -> None:
    assert running.ending("Running stage 'evaluate':\n  half a line")[0] == "killed"
    assert running.ending("") == ("killed", "said nothing")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("", CHAIN),
        ("Stage 'base_model' didn't change, skipping\n", CHAIN),
        ("Stage 'base_model' didn't change, skipping\nRunning stage 'prepare':\n", CHAIN[1:]),
        (
            "Stage 'base_model' is cached - skipping run\nRunning stage 'prepare':\nRunning stage 'evaluate':\n",
            CHAIN[2:],
        ),
    ],
)
def test_a_point_may_be_at_the_stage_its_log_names_last_or_at_those_it_does_not_name(
    said: str, left: list[str], tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(said)
    assert running.unfinished(tmp_path / "log", CHAIN) == left
    assert running.unfinished(tmp_path / "none", CHAIN) == CHAIN
