"""The hub, played by a server on this machine: what is fetched, what is refused, and what the user is told."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import pin
from stages.lib.errors import ExternalError, ModelError
from stages.lib.sources import hub
from tests.hub_stub import COMMIT, Hub, serving

LICENSE = "https://huggingface.co/maker/model"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.DEFAULT_REQUEST_TIMEOUT", 2)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


def fetch(folder: Path, revision: str = COMMIT) -> list[str]:
    hub.fetch_model("maker/model", revision, folder, license_url=LICENSE)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_only_the_files_a_model_folder_needs_are_fetched(stub: Hub, tmp_path: Path) -> None:
    needed = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "LICENSE": b"free"}
    others = (
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "README.md",
    )
    stub.files["models/maker/model"] = needed | dict.fromkeys(others, b"x")
    assert fetch(tmp_path / "new") == sorted(needed)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == b"weights"


def test_sharded_weights_are_those_the_index_names(stub: Hub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"x")
    stub.files["models/maker/model"] = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "o.safetensors": b"",
    }
    assert fetch(tmp_path / "new") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_model_with_pickled_weights_only_is_refused(stub: Hub, tmp_path: Path) -> None:
    stub.files["models/maker/model"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(
        ModelError, match=r"model\.safetensors is not there, found pytorch_model\.bin; only safetensors"
    ):
        fetch(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_a_gated_model_names_the_licence_page_and_the_variable(
    stub: Hub, tmp_path: Path, status: int, code: str
) -> None:
    stub.refused["models/maker/model"] = (status, code)
    with pytest.raises(ExternalError, match=rf"status {status}.*HF_TOKEN is not set.*{LICENSE}.*HF_TOKEN"):
        fetch(tmp_path / "new")


def test_the_token_is_sent_from_the_environment_and_is_in_no_message(
    stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    stub.refused["models/maker/model"] = (403, "GatedRepo")
    with pytest.raises(ExternalError, match="HF_TOKEN is set, but its owner has no access") as refused:
        fetch(tmp_path / "new")
    assert stub.tokens == {"Bearer hf_secretsecret"}
    assert "secretsecret" not in str(refused.value)


def test_without_the_variable_no_token_is_sent_not_even_one_stored_on_this_machine(
    stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    stub.files["models/maker/model"] = {"config.json": b"{}", "model.safetensors": b"x"}
    fetch(tmp_path / "new")
    assert stub.tokens == {""}


def test_an_unknown_model_and_an_unknown_commit_name_their_keys(stub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ExternalError, match=r"no such model.*base_model\.id"):
        fetch(tmp_path / "new")
    stub.files["models/maker/model"] = {"config.json": b"{}"}
    with pytest.raises(ExternalError, match=r"no such commit.*base_model\.revision"):
        fetch(tmp_path / "new", "f" * 40)


def test_a_hub_out_of_reach_is_one_message(stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the retries
    with pytest.raises(ExternalError, match=r"out of reach.*base_model=smollm2_135m"):
        fetch(tmp_path / "new")


def test_data_files_of_one_split_are_fetched(stub: Hub, tmp_path: Path) -> None:
    names = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md", "train.py")
    stub.files["datasets/maker/data"] = dict.fromkeys(names, b"x")
    ((file, name),) = hub.fetch_data("maker/data", COMMIT, "train")
    assert (name, file.read_bytes()) == ("data/train-00000-of-00001.parquet", b"x")
    with pytest.raises(ExternalError, match=r"of split 'dev' .* found data/test.*data\.split"):
        hub.fetch_data("maker/data", COMMIT, "dev")


def test_a_data_set_that_was_fetched_is_read_again_without_the_hub_but_only_whole(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.files["datasets/maker/data"] = {"train.jsonl": b"1", "train.csv.gz": b"2", "test.jsonl": b"3"}
    fetched = hub.fetch_data("maker/data", COMMIT, "train")
    assert [name for _, name in fetched] == ["train.csv.gz", "train.jsonl"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the retries
    assert hub.fetch_data("maker/data", COMMIT, "train") == fetched
    with pytest.raises(ExternalError, match=r"out of reach.*data=local"):
        hub.fetch_data("maker/data", COMMIT, "test")


CONF = """# A model.
source: hub
id: maker/model
revision: null    # `make pin` writes the commit here
license: free
"""


def test_make_pin_writes_the_commit_and_leaves_every_other_byte_alone(
    stub: Hub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.files["models/maker/model"] = {"config.json": b"{}"}
    (in_tmp / "conf/base_model").mkdir(parents=True)
    (in_tmp / "conf/data").mkdir()
    file = in_tmp / "conf/base_model/model.yaml"
    file.write_text(CONF)
    monkeypatch.setattr("sys.argv", ["pin"])
    assert pin.main() == 0
    assert file.read_text() == CONF.replace("null", COMMIT)
    assert pin.main() == 0
    assert capsys.readouterr().out.count(COMMIT) == 1


def test_make_pin_resolves_a_branch_and_reports_what_it_cannot(
    stub: Hub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.files["models/maker/model"] = {"config.json": b"{}"}
    (in_tmp / "conf/base_model").mkdir(parents=True)
    (in_tmp / "conf/data").mkdir()
    (in_tmp / "conf/base_model/model.yaml").write_text(CONF.replace("null", "main"))
    (in_tmp / "conf/base_model/other.yaml").write_text(CONF.replace("maker/model", "maker/other"))
    monkeypatch.setattr("sys.argv", ["pin"])
    assert pin.main() == 1
    assert COMMIT in (in_tmp / "conf/base_model/model.yaml").read_text()
    assert (in_tmp / "conf/base_model/other.yaml").read_text() == CONF.replace("maker/model", "maker/other")
    assert "other.yaml: maker/other@default branch: the hub has no such model" in capsys.readouterr().err


def test_make_pin_refuses_a_choice_that_is_none(in_tmp: Path) -> None:
    with pytest.raises(SystemExit, match="no choice 'gpt'"):
        pin.unpinned(in_tmp / "conf", ["gpt"])
