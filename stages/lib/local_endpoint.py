"""A GGUF file behind an OpenAI-compatible address of this machine, in a process of its own.

python -m stages.lib.local_endpoint <file.gguf> <context> <slots>     prints the address, ends when its input does
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.lib.errors import ExternalError, ModelError

CODE = Path(__file__).resolve().parents[2]
SPIN = "500"
"""How long llama.cpp's threads spin while they wait for each other (GNU OpenMP). It spins without end by itself: beside
other processes on the same two cores that gave 1 token a second, with this 9, without any spin 10 to 15."""


@contextmanager
def serving(file: Path, context: int = 4096, slots: int = 1) -> Iterator[str]:
    """The address (http://127.0.0.1:<port>/v1) at which the file answers while the block lasts.

    Args: context: tokens of a prompt and its answer. slots: requests answered at once; more wait. With one, answers do
        not depend on which others are in flight, nor on the ones before.
    Raises: ModelError, when it is no GGUF file; ExternalError, when llama.cpp does not load it.
    """
    with file.open("rb") as start:
        if (found := start.read(4)) != b"GGUF":
            raise ModelError(f"{file}: begins with {found!r}, expected a GGUF file, which begins with b'GGUF'.")
    command = [sys.executable, "-m", "stages.lib.local_endpoint", str(file.resolve()), str(context), str(slots)]
    with subprocess.Popen(
        command,
        cwd=CODE,
        env={"GOMP_SPINCOUNT": SPIN, **os.environ, "PIPELINE_ENV": sys.prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal goes to whoever started it, and may let it finish
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            address = next((line for line in server.stdout if line.startswith(b"http")), b"").decode().strip()
            if not address:
                raise ExternalError(f"{file}: llama.cpp does not load it, expected a GGUF file of a model for chats.")
            yield f"{address}/v1"
        finally:
            server.stdin.close()
            server.wait()


def main(file: str, context: str, slots: str) -> None:
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path = file
    how.model_alias = {Path(file).stem}  # else responses name the whole path
    how.n_parallel = int(slots)
    how.n_ctx = int(context) * int(slots)
    how.n_gpu_layers = 0
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as in llama_server.py
    how.cache_prompt = False  # read anew, a prompt gives the same bytes each time
    how.warmup = False
    how.use_jinja = True
    how.sampling.temp = 0  # unless a request asks for another temperature
    how.ui = False
    how.verbosity = 0
    server = xllamacpp.Server(how)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the server's own way down was seen to wait for ever
