"""A training killed with SIGKILL, as its command runs: it goes on by the same command, and ends with the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lib import chat, files, packing, records
from stages.lib.schema.pack import ControlTokens, Labels, OnOverlong, Pack
from tests.conftest import make_repo

PACK = Pack(64, OnOverlong.drop, Labels.assistant_only, ControlTokens.text, 0.05)
OUTPUTS = (
    "models/adapter/adapter_config.json",
    "models/adapter/adapter_model.safetensors",
    "models/adapter/samples.jsonl",
    "models/adapter/trained.json",
    "metrics/qlora_train.json",
    "plots/train.csv",
)
SETTINGS = (
    "lora.dropout=0.1",
    "train.batch_size=1",
    "train.gradient_accumulation_steps=4",
    "numerics.device=cpu",
    "runtime.checkpoint_minutes=0",
)


def ready(repository: Path, base: Path) -> Path:
    """A repository in which the stages before have run: 40 packs, 10 steps an epoch."""
    make_repo(repository)
    shutil.copytree(base, repository / "models/base")
    tokenizer = chat.load_tokenizer(base)
    for split, n in (("train", 42), ("validation", 3)):
        turns = [
            [
                {"role": "user", "content": f"add {i} 1 {'fox ' * (i % 9)}"},
                {"role": "assistant", "content": f"{i} plus"},
            ]
            for i in range(n)
        ]
        rows = [records.make(messages, group=split, source="test", task="add") for messages in turns]
        found = packing.encoded(records.table(rows), tokenizer=tokenizer, p=PACK, where=split)
        packs = packing.packs(found.tokens, max_tokens=PACK.max_tokens)
        packing.write(repository / f"data/packed/{split}/packs.parquet", packs)
    return repository


def start(repository: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.qlora_train", *SETTINGS, *settings]
    with (repository / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=repository, stdout=log, stderr=log, text=True, env={**os.environ})


def trained(repository: Path, *settings: str) -> dict[str, str]:
    """Let a training end; the hashes of what it wrote."""
    assert start(repository, *settings).wait(timeout=1200) == 0, (repository / "log.txt").read_text()
    return {name: files.sha256(repository / name) for name in OUTPUTS}


def kill_after(process: subprocess.Popen[str], repository: Path, step: int, seconds: float) -> None:
    """SIGKILL some seconds after the point of a step was written."""
    while not any(point.name >= f"step-{step:08d}" for point in repository.glob(".checkpoints/*/*/step-*")):
        assert process.poll() is None, (repository / "log.txt").read_text()
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def runs_of(repository: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{repository}/mlflow.db")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("model", "kills", "epochs"), [("tiny_model_dir", 5, 2), ("default_base", 2, 1)])
def test_killed_at_random_points_it_ends_with_the_bytes_of_an_uninterrupted_run(
    tmp_path: Path, request: pytest.FixtureRequest, model: str, kills: int, epochs: int
) -> None:
    """The uninterrupted runs: with 1 thread, and with 2 in a clone on another path."""
    base: Path = request.getfixturevalue(model)
    more = (f"train.epochs={epochs}",)
    whole = ready(tmp_path / "whole", base)
    expected = trained(whole, "runtime.threads=1", *more)
    clone = shutil.copytree(whole, tmp_path / "some" / "other" / "path")
    for folder in ("models/adapter", "runs"):
        shutil.rmtree(clone / folder)
    assert trained(clone, "runtime.threads=2", *more) == expected

    broken = ready(tmp_path / "broken", base)
    draw = random.Random(0)
    for i, step in enumerate(sorted(draw.sample(range(1, 10 * epochs - 2), kills))):
        process = start(broken, f"runtime.threads={1 + i % 2}", *more)
        kill_after(process, broken, step, draw.uniform(0, 0.3))
        assert [run.info.status for run in runs_of(broken)] == ["RUNNING"]
    assert trained(broken, "runtime.threads=3", *more) == expected
    assert "goes on after step-" in (broken / "log.txt").read_text()
    assert not list((broken / ".checkpoints").iterdir())
    (run,) = runs_of(broken)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags
