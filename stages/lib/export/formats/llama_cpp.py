"""What a GGUF file does in llama.cpp itself: how it renders a chat, how it answers, whether it stops."""

import json
import tempfile
from pathlib import Path

import torch

from stages.lib import apart, llama_server
from stages.lib.errors import ExternalError
from stages.lib.export.formats.exporter import Answer, Request, Session

SLOTS = 8  # prompts in flight; part of the arithmetic (batches), hence the same on every machine
TOP_K = 10


def ask(file: Path, request: Request, *, lora: Path | None = None) -> Session:
    """Continue prompts greedily and render chats, in a process of its own.

    Args: lora: an adapter laid over the file's weights.
    Raises: ExternalError, when llama.cpp does not load the file, crashes or answers otherwise than asked.
    """
    prompts = request.prompts
    asking = {
        "prompts": [list(prompt) for prompt in prompts],
        "chats": request.chats,
        "max_new_tokens": request.max_new_tokens,
        "top_k": TOP_K,
        "slots": min(SLOTS, len(prompts)),
        "context": max(map(len, prompts)) + request.max_new_tokens + 8,
        "threads": torch.get_num_threads(),
        "lora": str(lora.resolve()) if lora else None,
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, reply = Path(scratch) / "request.json", Path(scratch) / "reply.json"
        asked.write_text(json.dumps(asking), encoding="utf-8")
        apart.run(
            f"llama.cpp with {(lora or file).name}", llama_server.__name__, str(file.resolve()), str(asked), str(reply)
        )
        found = json.loads(reply.read_text(encoding="utf-8"))
    if len(found["answers"]) != len(prompts):
        raise ExternalError(f"{file.name}: llama.cpp gave {len(found['answers'])} answers to {len(prompts)} prompts.")
    answers = [
        Answer(
            prompt=prompt,
            ids=[token for token in answer["ids"] if token not in request.stop_ids],
            stopped=answer["stop"] == "eos",
            top=[{int(token): value for token, value in place.items()} for place in answer["top"]],
        )
        for prompt, answer in zip(prompts, found["answers"], strict=True)
    ]
    return Session(found["rendered"], found["tokens"], answers, found["seconds"], found["peak_mib"])
