"""Ask a runtime in a process of its own: chats and prompts go in as JSON, what it made of them comes back so."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from stages.lib import apart
from stages.lib.errors import ExternalError
from stages.lib.export.formats.exporter import Answer, Request, Session


def ask(
    runtime: str, module: str, path: Path, request: Request, *, python: str = sys.executable, **environment: str
) -> Session:
    """What `python -m <module> <path> <request.json> <reply.json>` replies.

    Args: runtime: its name, for messages. python: of the environment the runtime is installed in.
    Raises: ExternalError, when it does not load the format, crashes, or does not answer every prompt.
    """
    asking = {
        "chats": request.chats,
        "prompts": [list(prompt) for prompt in request.prompts],
        "stop_ids": sorted(request.stop_ids),
        "max_new_tokens": request.max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, reply = Path(scratch) / "request.json", Path(scratch) / "reply.json"
        asked.write_text(json.dumps(asking), encoding="utf-8")
        what = f"{runtime} with {path.name}"
        apart.run(what, module, str(path.resolve()), str(asked), str(reply), python=python, **environment)
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
