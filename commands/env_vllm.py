"""make env-vllm: create .venv-llmcompressor, in which the compressed-tensors formats for vLLM are written.

llmcompressor pins another transformers than the pipeline, hence an environment of its own, with its own lock. Standard
library only, as commands/install.py.
"""

import os
import sys
from pathlib import Path

from commands import install

ENVIRONMENT = Path(".venv-llmcompressor")
LOCK = Path("requirements-llmcompressor.lock")
WANTED = ("llmcompressor", "torch")


def main() -> int:
    links, on_gpu = install.find_links(), install.has_gpu()
    torch = install.torch_options(has_gpu=on_gpu, links=links, has_cpu_build=install.has_cpu_build(links))
    return install.perform(steps(torch), ENVIRONMENT, install.variables(os.environ, has_gpu=on_gpu))


def steps(torch: list[str]) -> list[list[str]]:
    uv, python = str(install.ENVIRONMENT / "bin" / "uv"), str(ENVIRONMENT / "bin" / "python")
    create = [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(ENVIRONMENT)]
    fill = [uv, "pip", "install", "--quiet", "--python", python, "--compile-bytecode", *torch]
    return [create, [*fill, "--constraints", str(LOCK), *WANTED]]


if __name__ == "__main__":
    sys.exit(main())
