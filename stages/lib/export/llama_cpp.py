"""What a GGUF file does in llama.cpp itself: how it renders a chat, how it answers, whether it stops."""

import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from stages.lib import chat, llama_server
from stages.lib.errors import ExternalError, GateError
from stages.lib.export.gguf import run_apart

SLOTS = 8  # prompts in flight; part of the arithmetic (batches), hence the same on every machine
TOP_K = 10
THREE_TURNS = (
    {"role": "user", "content": "What is 2 + 2?  Answer in one word."},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": 'And as JSON, {"sum": 4}?\n\nÜmläute, 漢字 and `code` too.'},
)


@dataclass(frozen=True)
class Answer:
    """One greedy answer. top: for each generated token, the runtime's most likely tokens, id -> log-probability."""

    prompt: Sequence[int]
    ids: list[int]
    text: str
    stopped: bool
    top: list[dict[int, float]]


@dataclass(frozen=True)
class Session:
    """rendered, tokens: the three-turn chat as the runtime writes and tokenizes it. seconds: for all answers."""

    rendered: str
    tokens: list[int]
    answers: list[Answer]
    seconds: float


def ask(file: Path, prompts: Sequence[Sequence[int]], *, stop_ids: Collection[int], max_new_tokens: int) -> Session:
    """Continue prompts (token ids) greedily and render the three-turn chat, in a process of its own.

    Raises: ExternalError, when llama.cpp does not load the file, crashes or answers otherwise than asked.
    """
    request = {
        "prompts": [list(prompt) for prompt in prompts],
        "chat": THREE_TURNS,
        "max_new_tokens": max_new_tokens,
        "top_k": TOP_K,
        "slots": min(SLOTS, len(prompts)),
        "context": max(map(len, prompts)) + max_new_tokens + 8,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, reply = Path(scratch) / "request.json", Path(scratch) / "reply.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        run_apart(f"llama.cpp with {file.name}", llama_server.__name__, str(file.resolve()), str(asked), str(reply))
        found = json.loads(reply.read_text(encoding="utf-8"))
    if len(found["answers"]) != len(prompts):
        raise ExternalError(f"{file.name}: llama.cpp gave {len(found['answers'])} answers to {len(prompts)} prompts.")
    answers = [
        Answer(
            prompt=prompt,
            ids=[token for token in answer["ids"] if token not in stop_ids],
            text=answer["text"],
            stopped=answer["stop"] == "eos",
            top=[{int(token): value for token, value in place.items()} for place in answer["top"]],
        )
        for prompt, answer in zip(prompts, found["answers"], strict=True)
    ]
    return Session(found["rendered"], found["tokens"], answers, found["seconds"])


def check_chat(file: Path, session: Session, tokenizer: PreTrainedTokenizerFast) -> None:
    """Hold the runtime's tokens of a three-turn chat, template included, to those of training.

    Raises: GateError, with the first place where they differ.
    """
    expected = chat.prompt_ids(tokenizer, THREE_TURNS)
    found = session.tokens
    if found == expected:
        return
    ends = min(len(expected), len(found))
    at = next((place for place in range(ends) if expected[place] != found[place]), ends)
    raise GateError(
        f"{file.name}: llama.cpp writes a chat otherwise than training did, from token {at}: found "
        f"{tokenizer.decode(found[at : at + 8])!r}, expected {tokenizer.decode(expected[at : at + 8])!r}. "
        "Check export.gguf_pre_tokenizer and the chat template of models/base."
    )
