"""A search as people run it: a trial is a DVC experiment, and one that was pruned is none, but shows in MLflow."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.experiments import kept, running
from stages.lib.experiments.points import Point
from tests.conftest import run, variables
from tests.dag.test_repro import runs

FIXED = {"train.epochs": 8, "train.evals_per_epoch": 1, "train.early_stopping_patience": 0, "train.samples": 0}
SEARCH = f"""
defaults: [none]
id: tiny
target: qlora_train
fixed: {json.dumps(FIXED)}
points:
  - train.learning_rate: 0.01
  - train.learning_rate: 1.0e-6
search:
  metric: val/loss/tuned
  direction: minimize
  trials: 2
  seed: 0
  sampler: random
  space:
    train.learning_rate: [0.01, 1.0e-6]
  pruning: {{keep: 0.5, after_trials: 1, after_evaluations: 1}}
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_search_goes_on_and_a_pruned_trial_is_no_experiment_until_it_is_trained_to_its_end(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "conf/sweep/tiny.yaml").write_text(SEARCH)
    search = [sys.executable, "-m", "commands.search", "tiny"]
    log = project / "runs/sweeps/tiny"
    with subprocess.Popen(search, cwd=project, env=variables(project), stdout=subprocess.DEVNULL) as driver:
        while not any("step 20/" in path.read_text() for path in log.glob("*.log")):
            assert driver.poll() is None, "the search ended before it was to be killed"
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)

    done = run(project, *search, timeout=900)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trials ended: 1 complete, 1 pruned, 0 failed" in done.stdout
    complete, pruned = re.findall(r"trial \d (tiny-\w+) (?:done|pruned)", done.stdout)
    listed = run(project, "dvc", "exp", "list", "--name-only").stdout.split()
    assert complete in listed
    assert pruned not in listed
    rows = runs(project)
    assert rows[complete].info.status == "FINISHED"
    assert rows[pruned].info.status == "KILLED"
    assert rows[pruned].data.tags["failure"].startswith("Pruned: stopped at step")
    assert rows[pruned].data.tags["sweep_id"] == "tiny"

    point = Point(pruned, {**FIXED, "train.learning_rate": 1.0e-6})
    whole = run(project, *running.command(point, "tiny", "qlora_train"), timeout=600)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "goes on after step-" in whole.stdout
    monkeypatch.chdir(project)
    metrics = kept.find(pruned).metrics["qlora_train"]
    assert metrics["train/steps"] == metrics["train/steps/planned"]
    assert runs(project)[pruned].info.status == "FINISHED"
