"""The 4-bit base with several adapters, each a model by its own name, as they were trained and evaluated."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from stages.lib import chat, models, numerics
from stages.lib.errors import ConfigError
from stages.lib.schema.numerics import Numerics
from stages.lib.serving import requests, structured
from stages.lib.serving.refusals import Refusal
from stages.lib.serving.turns import Asked, End, Turns

BASE = "base"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNSAID = 1024  # tokens of an answer whose request does not limit it


def parse(given: list[str]) -> dict[str, Path]:
    """name=folder, each.

    Raises: ConfigError, for what is no such pair, a name that is taken, or one no model can have.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, is_pair, folder = text.partition("=")
        if not is_pair or not folder or not NAME.fullmatch(name):
            raise ConfigError(
                f"--adapters: found {text!r}, expected name=folder, the name of letters, digits, . _ - such as "
                "banking=models/adapter."
            )
        if name == BASE or name in found:
            raise ConfigError(f"--adapters: the name {name!r} is taken. Give {folder} another one.")
        found[name] = Path(folder)
    return found


class Adapters:
    """The models `base` and those of the adapters.

    Args: context: tokens of a prompt and its answer. slots: answers that are written at once.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], n: Numerics, *, context: int, slots: int) -> None:
        self.names: Sequence[str] = [BASE, *adapters]
        self._tokenizer = chat.load_tokenizer(base)
        # PEFT keeps adapters as modules, whose names hold no dots
        inner = {name: f"adapter{i}" for i, name in enumerate(adapters)}
        dense = numerics.resolve(n).device == "cpu"
        folders = {inner[name]: folder for name, folder in adapters.items()}
        model = models.load_several(base, folders, n, dense=dense)
        config = model.get_base_model().config.get_text_config()
        self._context = min(context, config.max_position_embeddings)
        stop_ids = chat.stop_ids(self._tokenizer, base)
        # made at the first need: it takes a second
        self._guides = cache(partial(structured.guides, self._tokenizer, config.vocab_size, tuple(stop_ids)))
        weights: dict[str, Callable[[], AbstractContextManager[Any]]] = {BASE: model.disable_adapter}
        weights |= {name: partial(_only, model, inner[name]) for name in adapters}
        self.turns = Turns(model, self._tokenizer, stop_ids, weights, slots=slots)

    def is_well(self) -> bool:
        return self.turns.is_alive()

    async def respond(self, body: dict[str, Any]) -> Response:
        asked = requests.read(body)
        pieces = self._pieces(self._prepared(asked))
        about = _about(asked.model)
        if asked.stream:
            shows_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(pieces, about, shows_usage), media_type="text/event-stream")
        text = ""
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, End):
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "message": message, "finish_reason": piece.reason, "logprobs": None}
                    whole = {"object": "chat.completion", "choices": [choice], "usage": _usage(piece)}
                    return JSONResponse(about | whole)
                text += piece
        raise AssertionError("an answer without an end")

    def _prepared(self, asked: requests.Chat) -> Asked:
        """Raises: Refusal, for turns that the chat template refuses, or more tokens than the context holds."""
        try:
            prompt = chat.prompt_ids(self._tokenizer, [message.turn() for message in asked.messages])
        except chat.UnusableConversation as fault:
            raise Refusal(400, f"messages: {fault}", code=fault.reason, param="messages") from None
        room = self._context - len(prompt)
        if room < (asked.limit or 1):
            raise Refusal(
                400,
                f"This model's context is {self._context} tokens; the messages have {len(prompt)}, and "
                f"{asked.limit or 1} were asked for. Shorten the messages, or max_tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        schema = asked.response_format.schema_asked() if asked.response_format else None
        return Asked(
            asked.model,
            prompt,
            min(UNSAID, room) if asked.limit is None else asked.limit,
            tell=lambda piece: None,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed % 2**63,
            stops=asked.stops,
            guide=None if schema is None else self._guides()(schema),
        )

    async def _pieces(self, asked: Asked) -> AsyncGenerator[str | End]:
        """What the model's thread tells, to the End; when nobody listens any more, it is told so."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[str | End]()
        asked.tell = lambda piece: _post(loop, told, piece)
        self.turns.ask(asked)
        try:
            while True:
                piece = await told.get()
                if isinstance(piece, End) and piece.reason == "failed":
                    raise Refusal(500, "The model failed on this request; the server's log says how.")
                yield piece
                if isinstance(piece, End):
                    return
        finally:
            asked.is_wanted = False


def _post(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[str | End], piece: str | End) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(told.put_nowait, piece)


def _only(model: PeftModel, name: str) -> AbstractContextManager[None]:
    if model.active_adapter != name:
        model.set_adapter(name, inference_mode=True)
    return nullcontext()


def _about(model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


async def _events(pieces: AsyncGenerator[str | End], about: dict[str, Any], shows_usage: bool) -> AsyncGenerator[str]:
    """Server-sent events: the role, the pieces of the text, why it ended, what it took where asked for, [DONE]."""

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event(about | {"object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in pieces:
            if not isinstance(piece, End):
                yield event({"content": piece})
                continue
            yield event({}, piece.reason)
            if shows_usage:
                yield _event(about | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(piece)})
        yield "data: [DONE]\n\n"
    except Refusal as fault:  # the status has been sent; clients read an error in its place
        yield f"data: {bytes(fault.response().body).decode()}\n\n"
    finally:
        await pieces.aclose()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
