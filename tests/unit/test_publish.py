"""What goes to the Hugging Face hub, played by a server on this machine, and what is refused before it is asked."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import publish
from stages.lib import files
from stages.lib.export import manifest
from tests.hub_stub import Hub, serving
from tests.promoted import CARD, edit, make_copy, make_export

TOKEN = "hf_SecretOfTheTest"
REPO = "models/me/tiny"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return make_copy(make_export(tmp_path / "models/export"))


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the hub's own protocol for large files
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.DEFAULT_REQUEST_TIMEOUT", 2)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


def published(copy: Path, *arguments: str) -> int:
    return publish.main(["--repo", "me/tiny", str(copy), *arguments])


def test_without_upload_files_sizes_and_card_are_listed_and_nothing_is_sent(
    copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published(copy) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines[:5]] == [
        "LICENSE.md",
        "README.md",
        "bnb/model.safetensors",
        "manifest.json",
        "tiny-Q8_0.gguf",
    ]
    assert lines[4][0] == "12"
    assert lines[5][1:] == "bytes in 5 files, for me/tiny, private".split()
    assert lines[6][:5] == ["card:", "license", "apache-2.0,", "base_model", "tiny/llama,"]
    assert (stub.files, stub.tokens) == ({}, set())


def test_an_upload_sends_what_the_manifest_names_in_one_commit_to_a_private_repository(
    copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / ".cache").mkdir()
    (copy / ".cache/lock").write_text("left by a download")
    assert published(copy, "--upload") == 0
    sent = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert stub.files[REPO] == {name: content for name, content in sent.items() if not name.startswith(".cache")}
    assert stub.private == {REPO}
    assert stub.commits == ["Experiment rocky-dogs, commit cccccccccccc"]
    assert stub.tokens == {f"Bearer {TOKEN}"}
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err


def test_what_came_down_from_the_hub_is_what_its_manifest_says(copy: Path, stub: Hub, tmp_path: Path) -> None:
    assert published(copy, "--upload") == 0
    for name, content in stub.files[REPO].items():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert manifest.faults(tmp_path / "down") == []


def test_a_later_upload_removes_what_the_earlier_manifest_named_and_nothing_else(
    copy: Path, stub: Hub, tmp_path: Path
) -> None:
    assert published(copy, "--upload") == 0
    stub.files[REPO]["notes.md"] = b"of a person"
    later = make_export(tmp_path / "later/export", weights=b"GGUF new")
    (later / "bnb/model.safetensors").unlink()
    found = files.read_json(later / manifest.NAME)
    del found["files"]["bnb/model.safetensors"]
    files.write_json(later / manifest.NAME, found)
    assert published(make_copy(later), "--upload") == 0
    assert sorted(stub.files[REPO]) == ["LICENSE.md", "README.md", "manifest.json", "notes.md", "tiny-Q8_0.gguf"]
    assert stub.files[REPO]["tiny-Q8_0.gguf"] == b"GGUF new"


def test_weights_meant_for_few_do_not_go_to_a_public_repository(
    copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.files[REPO] = {}
    assert published(copy, "--upload") == 2
    assert "me/tiny: is not private, as asked" in capsys.readouterr().err
    assert stub.files[REPO] == {}
    assert published(copy, "--upload", "--public") == 0


def test_a_refusal_of_the_hub_is_one_message_without_the_token(
    copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.refused[REPO] = (403, "")
    assert published(copy, "--upload") == 2
    said = capsys.readouterr().err
    assert "did not take it (status 403); nothing was committed" in said
    assert TOKEN not in said


def test_no_upload_without_a_token_in_the_environment(
    copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert published(copy, "--upload") == 2
    assert "HF_TOKEN: not set" in capsys.readouterr().err
    assert stub.tokens == set()


def test_an_edited_folder_is_refused(copy: Path, stub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy)
    assert published(copy, "--upload") == 2
    assert "README.md: changed" in capsys.readouterr().err
    assert stub.files == {}


def test_a_folder_that_was_not_promoted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert published(make_export(tmp_path / "models/export")) == 2
    assert "names no commit and no run" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "../tiny", "me/ti ny", ""])
def test_what_is_no_repository_is_refused(copy: Path, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["--repo", repo, str(copy)]) == 2
    assert "expected owner/name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (CARD.replace("license: apache-2.0\n", ""), "no license in its metadata"),
        (CARD.replace("license: apache-2.0", "license: ["), "could not read this card"),
        ("# no metadata\n", "no license, base_model, pipeline_tag, library_name"),
    ],
)
def test_a_card_the_hub_would_not_list_is_refused(
    tmp_path: Path, card: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export = make_export(tmp_path / "models/export")
    (export / "README.md").write_text(card)
    found = json.loads((export / manifest.NAME).read_text())
    found["files"]["README.md"] = files.sha256(export / "README.md")
    files.write_json(export / manifest.NAME, found)
    assert published(make_copy(export)) == 2
    assert said in capsys.readouterr().err
