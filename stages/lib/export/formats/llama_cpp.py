"""What a GGUF file does in llama.cpp itself: how it renders a chat, how it answers, whether it stops."""

from pathlib import Path

from stages.lib import llama_server
from stages.lib.export.formats import elsewhere
from stages.lib.export.formats.exporter import Request, Session

SLOTS = 8  # prompts in flight; part of the arithmetic (batches), hence the same on every machine
TOP_K = 10


def ask(file: Path, request: Request, *, lora: Path | None = None) -> Session:
    """Continue prompts greedily and render chats, in a process of its own.

    Args: lora: an adapter laid over the file's weights.
    Raises: ExternalError, when llama.cpp does not load the file, crashes or answers otherwise than asked.
    """
    more = {
        "top_k": TOP_K,
        "slots": min(SLOTS, len(request.prompts)),
        "context": max(map(len, request.prompts)) + request.max_new_tokens + 8,
        "lora": str(lora.resolve()) if lora else None,
    }
    return elsewhere.ask("llama.cpp", llama_server.__name__, file, request, more=more)
