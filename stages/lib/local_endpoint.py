"""A GGUF file behind an OpenAI-compatible address of this machine, in a process of its own.

python -m stages.lib.local_endpoint <file.gguf> <context>     prints the address, ends when its input does
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.lib.errors import ExternalError

CODE = Path(__file__).resolve().parents[2]


@contextmanager
def serving(file: Path, context: int = 4096) -> Iterator[str]:
    """The address (http://127.0.0.1:<port>/v1) at which the file answers while the block lasts. context: tokens.

    Raises: ExternalError, when llama.cpp does not load the file.
    """
    command = [sys.executable, "-m", "stages.lib.local_endpoint", str(file.resolve()), str(context)]
    with subprocess.Popen(
        command,
        cwd=CODE,
        env={**os.environ, "PIPELINE_ENV": sys.prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        address = next((line for line in server.stdout if line.startswith(b"http")), b"").decode().strip()
        try:
            if not address:
                raise ExternalError(f"{file}: llama.cpp does not load it, expected a GGUF file of a model for chats.")
            yield f"{address}/v1"
        finally:
            server.stdin.close()
            server.wait()


def main(file: str, context: str) -> None:
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path = file
    how.model_alias = {Path(file).stem}  # else responses name the whole path
    how.n_parallel = 1  # answers of one prompt do not depend on which others are in flight
    how.n_ctx = int(context)
    how.n_gpu_layers = 0
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as in llama_server.py
    how.cache_prompt = False
    how.warmup = False
    how.use_jinja = True
    how.verbosity = 0
    server = xllamacpp.Server(how)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the server's own way down was seen to wait for ever
