"""Models in processes of their own: asked chats and prompts, or read row by row."""

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from stages.lib import apart
from stages.lib.errors import ExternalError, ModelError
from stages.lib.export.formats.exporter import Answer, Request, Session


def ask(
    runtime: str,
    module: str,
    path: Path,
    request: Request,
    *,
    more: Mapping[str, Any] | None = None,
    python: str = sys.executable,
) -> Session:
    """What `python -m <module> <path> <request.json> <reply.json>` replies.

    Args: runtime: its name, for messages. more: what this runtime is told beside the request. python: of the
        environment the runtime is installed in.
    Raises: ExternalError, when it does not load the format, crashes, or does not answer every prompt.
    """
    asking = {
        "chats": request.chats,
        "prompts": [list(prompt) for prompt in request.prompts],
        "stop_ids": sorted(request.stop_ids),
        "max_new_tokens": request.max_new_tokens,
        "threads": torch.get_num_threads(),
    } | dict(more or {})
    with tempfile.TemporaryDirectory() as scratch:
        asked, reply = Path(scratch) / "request.json", Path(scratch) / "reply.json"
        asked.write_text(json.dumps(asking), encoding="utf-8")
        what = f"{runtime} with {path.name}"
        place = {"PIPELINE_ENV": prefix(python)}
        apart.run(what, module, str(path.resolve()), str(asked), str(reply), python=python, environment=place)
        found = json.loads(reply.read_text(encoding="utf-8"))
    if len(found["answers"]) != len(request.prompts):
        raise ExternalError(f"{what}: {len(found['answers'])} answers came to {len(request.prompts)} prompts.")
    answers = [
        Answer(
            prompt=prompt,
            ids=[token for token in answer["ids"] if token not in request.stop_ids],
            stopped=answer["stopped"],
            top=[{int(token): value for token, value in place.items()} for place in answer["top"]],
        )
        for prompt, answer in zip(request.prompts, found["answers"], strict=True)
    ]
    return Session(found["rendered"], found["tokens"], answers, found["seconds"], found["peak_mib"])


def prefix(python: str) -> str:
    """The environment a python belongs to."""
    return str(Path(python).parents[1])


class Model:
    """A model in a process of its own, as stages.lib.fidelity sees models: called with a row, it gives
    log-probabilities. The process ends with this object.

    Its module is run as `python -m <module> <path> <file.npy>`, gets one JSON object a line, and answers `done`.
    """

    def __init__(self, path: Path, module: str, *, python: str) -> None:
        self.path = path
        scratch = tempfile.TemporaryDirectory()
        self.file = Path(scratch.name) / "log_probs.npy"
        self.said = Path(scratch.name) / "said.txt"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [python, "-m", module, str(path.resolve()), str(self.file)],
                cwd=apart.CODE,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PIPELINE_ENV": prefix(python)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        weakref.finalize(self, _end, self.process, scratch)

    def __call__(self, row: Sequence[int], start: int) -> torch.Tensor:
        """Raises: ModelError, when the process does not load what is at `path`, or ends."""
        asked, replies = _pipes(self.process)
        try:
            asked.write(json.dumps({"row": [int(token) for token in row], "start": start}) + "\n")
            asked.flush()
            is_done = replies.readline() == "done\n"
        except BrokenPipeError:
            is_done = False
        if not is_done:
            last = [line for line in self.said.read_text(errors="replace").splitlines() if line.strip()][-6:]
            raise ModelError(f"{self.path}: cannot be loaded again. The last lines of the process:\n" + "\n".join(last))
        return torch.from_numpy(np.load(self.file))


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[str], scratch: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.communicate()  # waits, and closes the pipes
    scratch.cleanup()
