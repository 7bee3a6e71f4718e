"""An export is what its manifest says, wherever it is handed on: each way to change a folder is seen and named."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest

from commands import verify_export
from stages.lib import files
from stages.lib.errors import DataError
from stages.lib.export import manifest
from tests.promoted import make_export


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "models/export")


def renamed(export: Path, name: str, new: str) -> None:
    """Let the manifest call a file otherwise."""
    found = files.read_json(export / manifest.NAME)
    found["files"][new] = found["files"].pop(name)
    files.write_json(export / manifest.NAME, found)


def added(export: Path, name: str, content: bytes) -> None:
    """A file that the manifest names."""
    (export / name).write_bytes(content)
    found = files.read_json(export / manifest.NAME)
    found["files"][name] = files.sha256(export / name)
    files.write_json(export / manifest.NAME, found)


def test_an_export_as_it_was_written_has_no_faults(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_export.main([str(export)]) == 0
    assert capsys.readouterr().out == f"{export}: 4 files, each as manifest.json says\n"


def test_what_is_missing_unknown_or_changed_is_named(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (export / "README.md").write_text("another")
    (export / "bnb/model.safetensors").unlink()
    (export / "extra.txt").write_text("new")
    assert verify_export.main([str(export)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{export}/README.md: changed",
        f"{export}/bnb/model.safetensors: missing",
        f"{export}/extra.txt: unknown to the manifest",
        f"{export}: 3 faults",
    ]


def test_one_flipped_bit_is_seen(export: Path) -> None:
    weights = export / "tiny-Q8_0.gguf"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"tiny-Q8_0\.gguf: changed"):
        manifest.verify(export)


def test_a_link_is_refused_although_its_target_has_the_right_bytes(export: Path, tmp_path: Path) -> None:
    (export / "README.md").rename(tmp_path / "elsewhere")
    (export / "README.md").symlink_to(tmp_path / "elsewhere")
    (export / "out").symlink_to(tmp_path)
    assert [fault.split(":")[0] for fault in manifest.faults(export)] == ["README.md", "out"]
    assert all("symbolic link" in fault for fault in manifest.faults(export))


def test_a_pipe_is_refused(export: Path) -> None:
    os.mkfifo(export / "pipe")
    assert manifest.faults(export) == ["pipe: neither a file nor a folder"]


@pytest.mark.parametrize("name", ["weights.bin", "old.pt", "code.py", "state.pkl"])
def test_a_file_that_runs_code_is_refused_by_its_name(export: Path, name: str) -> None:
    added(export, name, b"x")
    assert manifest.faults(export) == [f"{name}: can run code when it is loaded"]


def test_a_pickle_is_refused_whatever_it_is_called(export: Path) -> None:
    added(export, "notes.txt", pickle.dumps({"a": 1}))
    with zipfile.ZipFile(export / "in.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    added(export, "in.zip", (export / "in.zip").read_bytes())
    assert [fault.split(":")[0] for fault in manifest.faults(export)] == ["in.zip", "notes.txt"]


def test_weights_that_begin_as_a_pickle_does_are_weights(export: Path) -> None:
    added(export, "other.safetensors", b"\x80\x02\x00\x00\x00\x00\x00\x00 a header of 640 bytes")
    assert manifest.faults(export) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\outside", ""])
def test_a_manifest_that_names_a_path_outside_is_refused(export: Path, name: str) -> None:
    renamed(export, "README.md", name)
    faults = manifest.faults(export)
    assert f"{name}: the manifest names a path outside the folder" in faults
    with pytest.raises(DataError, match="outside the folder"):
        manifest.copy(export, export.with_name("copy"), {})
    assert not export.with_name("copy").exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": "abc"}}', "not json"])
def test_without_a_manifest_there_is_nothing_to_hold_a_folder_to(export: Path, text: str | None) -> None:
    (export / manifest.NAME).unlink()
    if text is not None:
        (export / manifest.NAME).write_text(text)
    assert verify_export.main([str(export)]) == 2


def test_what_a_download_from_the_hub_leaves_is_no_fault(export: Path) -> None:
    (export / ".gitattributes").write_text("*.gguf filter=lfs")
    (export / ".cache/huggingface").mkdir(parents=True)
    (export / ".cache/huggingface/lock").write_text("")
    assert manifest.faults(export) == []


def test_a_manifest_says_nothing_of_time_and_place(export: Path, tmp_path: Path) -> None:
    again = make_export(tmp_path / "another/place/export")
    text = (export / manifest.NAME).read_text()
    assert text == (again / manifest.NAME).read_text()
    assert str(tmp_path) not in text


def test_a_manifest_names_what_decides_the_bytes(export: Path) -> None:
    found = manifest.read(export)
    assert set(found) == {
        *("adapter", "base", "data", "files", "formats", "packages", "recommended", "skipped"),
    }
    assert found["recommended"] == "tiny-Q8_0.gguf"
    assert found["skipped"] == {"onnx_int4": "onnxruntime-genai is not installed"}
    assert {"torch", "transformers", "peft", "cyllama", "gguf"} <= set(found["packages"])
    assert "pytest" not in found["packages"]


def test_packages_that_write_no_format_of_the_export_are_not_named() -> None:
    assert "cyllama" not in manifest.versions(["bnb_nf4"])


def test_data_has_the_hash_that_dvc_gives_it(tmp_path: Path) -> None:
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs import localfs

    folder = tmp_path / "splits"
    for name in ("train.parquet", "a/b.txt", "a-b.txt", "Z", "ü.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    named = build(HashFileDB(localfs, str(tmp_path / "cache")), str(folder), localfs, "md5", dry_run=True)[2]
    assert manifest.dvc_md5(folder) == named.hash_info.value


def test_a_copy_says_where_it_comes_from_and_verifies(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "promoted/tiny/abc"
    manifest.copy(export, copy, {"commit": "c", "run_id": "r"})
    assert manifest.faults(copy) == []
    told = manifest.read(copy)["promoted"]
    assert told == {"commit": "c", "run_id": "r", "manifest_sha256": files.sha256(export / manifest.NAME)}
    assert manifest.faults(export) == []


def test_a_copy_that_fails_leaves_nothing(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.copy(export, tmp_path / "promoted/tiny/abc", {})
    assert list((tmp_path / "promoted/tiny").iterdir()) == []
