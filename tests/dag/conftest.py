"""The tiny pipeline that the tests of this folder run DVC on: a random model, rows made here, everything else real."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import WORDS, git, make_repo, run
from tests.hub_stub import COMMIT, serving

OVERRIDES = [
    "base_model=smollm2_135m_hub",
    "base_model.id=tiny/llama",
    f"base_model.revision={COMMIT}",
    "data=local",
    "data.path=data/raw/rows.jsonl",
    "pack.max_tokens=128",
    "lora.r=4",
    "train.learning_rate=0.01",
    "train.gradient_accumulation_steps=1",
    "train.samples=1",
    "evaluate.max_new_tokens=8",
    "evaluate.bootstrap_samples=100",
    "merge.rows=4",
    "export.rows=4",
    "export.formats=[gguf_f16,gguf_q8_0,bnb_nf4]",
    "export.gguf_pre_tokenizer=gpt-2",
]
TRAINED = ["qlora_train", "evaluate", "merge", "quantize_export"]
STAGES = ["base_model", "prepare", "dedup_split", "tokenize_pack", *TRAINED]


def rows(count: int) -> str:
    """Chats that have little in common, as JSONL; one bad row at the end."""
    draw = random.Random(0)
    words = sorted(set(WORDS.split()))
    lines = []
    for i in range(count):
        question = " ".join(draw.choices(words, k=12))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": question.split()[0]}]
        lines.append(json.dumps({"messages": turns, "group": f"g{i}"}))
    return "\n".join([*lines, '{"messages": [']) + "\n"


@pytest.fixture(scope="session")
def server(tiny_model_dir: Path) -> Iterator[str]:
    with serving() as stub:
        stub.files["models/tiny/llama"] = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
        yield stub.address


@pytest.fixture(scope="session")
def prepared(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose committed params.yaml names the tiny model and the rows made here."""
    folder = make_repo(tmp_path_factory.mktemp("project") / "repo")
    (folder / "data/raw").mkdir(parents=True, exist_ok=True)
    (folder / "data/raw/rows.jsonl").write_text(rows(90))
    git(folder, "add", "-A")
    written = run(folder, "python", "-m", "commands.params", *OVERRIDES)
    assert written.returncode == 0, written.stderr
    defaults = folder / "conf/experiment/tiny.yaml"
    defaults.parent.mkdir(exist_ok=True)
    tree: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
    for own in ("checked", "sweep"):
        tree.pop(own)
    # `dvc exp run` composes conf/ anew: what is tiny must be in conf/ too
    defaults.write_text("# @package _global_\n" + yaml.safe_dump(tree))
    config = folder / "conf/config.yaml"
    config.write_text(config.read_text().replace("- experiment: null", "- experiment: tiny"))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "tiny")
    return folder


@pytest.fixture(scope="session")
def finished(prepared: Path, server: str) -> Path:
    """The same after one complete `dvc repro`, its results committed."""
    done = run(prepared, "dvc", "repro", HF_ENDPOINT=server, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    git(prepared, "add", "-A")
    git(prepared, "commit", "-qm", "results")
    return prepared


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished repository for the tests of one file, which may change it as they like."""
    folder = tmp_path_factory.mktemp("copy") / "repo"
    shutil.copytree(finished, folder, symlinks=True)
    return folder
