"""A server of `make serve` in a process of its own, while a block lasts."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile

from stages.lib.errors import ExternalError


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Its address (http://127.0.0.1:<port>/v1) and process id. At the end it is asked to stop, and waited for.

    Args: arguments: those of commands.serve, but for the port, which is a free one.
    Raises: ExternalError, with what it said, when it does not start.
    """
    command = [sys.executable, "-m", "commands.serve", *arguments, "--port", "0"]
    with (
        TemporaryFile("w+") as said,
        # a session of its own: Ctrl-C in a terminal ends an answer, not the server
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True) as server,
    ):
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split(" ")[0]
            if not address.startswith("http"):
                server.wait()
                said.seek(0)
                raise ExternalError(said.read().strip() or "the server ended without a word")
            yield address, server.pid
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
            server.wait()
