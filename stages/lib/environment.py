"""Which python runs the stages, where the project's own repository is, and what a result may depend on beside both."""

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

Description = dict[str, dict[str, str]]
"""Kind (package, hardware, threads, arithmetic) -> what -> its state, as text."""

ARITHMETIC = ("MKL_CBWR", "MKL_DYNAMIC", "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "TORCHDYNAMO_DISABLE")
INSTRUCTIONS = re.compile(r"fma|avx\w*|amx\w*|asimd\w*|sve\w*|bf16|i8mm")  # libraries choose their kernels by these
NAMED_ALWAYS = ("torch",)  # whose build matters beside its version: 2.13.0+cpu


def root() -> Path:
    """The user's repository: DVC names it in DVC_ROOT, also while an experiment runs in a temporary copy of it.

    PIPELINE_ROOT goes before: DVC starts the points of a sweep from a copy, too. Outside of both it is the nearest
    folder upwards that DVC knows, or the working folder.
    """
    if named := os.environ.get("PIPELINE_ROOT") or os.environ.get("DVC_ROOT"):
        return Path(named).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def fault() -> str | None:
    """Why this python must not run a stage, in one line; None when it may.

    The environment is `.venv` of the repository, or the one that PIPELINE_ENV names (a container, a cluster's module).
    """
    expected = Path(os.environ.get("PIPELINE_ENV") or root() / ".venv").resolve()
    found = Path(sys.prefix).resolve()
    if found == expected:
        return None
    return (
        f"python of {found} runs a stage, expected the one of {expected}. "
        "Type `make env`, then put .venv/bin first on PATH (make does), or name another environment in PIPELINE_ENV."
    )


def describe(lock: Path = Path("requirements.lock")) -> Description:
    """What may change the last bits of a result beside parameters, data and code, as it is for this process.

    Of packages those that are not as the lock has them, so that equal environments read alike. Torch is not needed.
    """
    return {
        "package": _packages(lock),
        "hardware": _cpu(Path("/proc/cpuinfo")) | _gpu(),
        "threads": {"threads": os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))},
        "arithmetic": {name: os.environ[name] for name in ARITHMETIC if name in os.environ},
    }


def differences(recorded: Description, here: Description) -> dict[str, list[str]]:
    """Kind -> one line for each thing that is not the same; kinds without any are left out."""
    found = {}
    for kind in here:
        left, right = recorded.get(kind, {}), here[kind]
        absent = "as locked" if kind == "package" else "none"
        lines = [
            f"{what}: {left.get(what, absent)} when recorded, {right.get(what, absent)} here"
            for what in sorted(left.keys() | right.keys())
            if left.get(what) != right.get(what)
        ]
        if lines:
            found[kind] = lines
    return found


def unlocked(here: Description) -> list[str]:
    """One line for each installed package whose version is not that of the lock."""
    return [f"{name}: {state}" for name, state in here["package"].items() if "locked" in state]


def _packages(lock: Path) -> dict[str, str]:
    found = {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE) if lock.exists() else []
    for name, pinned in pins:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # an extra, or CUDA's libraries on a machine without a GPU
            continue
        if version.partition("+")[0] != pinned:
            found[name] = f"{version} (locked: {pinned})"
        elif name in NAMED_ALWAYS:
            found[name] = version
    return found


def _cpu(info: Path) -> dict[str, str]:
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^(?:model name|CPU part)\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    known = sorted(flag for flag in (flags[1].split() if flags else []) if INSTRUCTIONS.fullmatch(flag))
    name = f"{model[1] if model else 'unknown'} ({platform.machine()})"
    return {"cpu": name, "instructions": " ".join(known)}


def _gpu() -> dict[str, str]:
    """Names and driver of the NVIDIA cards this process may use; nothing where there are none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = sorted({str(pynvml.nvmlDeviceGetName(card)) for card in cards})
        return {"gpu": ", ".join(names), "driver": str(pynvml.nvmlSystemGetDriverVersion())}
    except pynvml.NVMLError:
        return {}
