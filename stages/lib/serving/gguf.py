"""A GGUF file, answered by llama.cpp: requests and answers pass as they are, errors in OpenAI's shape."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
from starlette.responses import JSONResponse, Response, StreamingResponse

from stages.lib.serving.refusals import Refusal


class LlamaCpp:
    """What stages.lib.local_endpoint serves, under one name."""

    def __init__(self, address: str, name: str) -> None:
        self.names: Sequence[str] = [name]
        self._url = f"{address}/chat/completions"
        # Answers take as long as they take; never through a proxy, it is this machine. Each request on a connection of
        # its own: llama.cpp closes one after some hundred, and loses the request that is on its way just then.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)
        self._is_well = True

    def is_well(self) -> bool:
        return self._is_well

    async def respond(self, body: dict[str, Any]) -> Response:
        asked = self._client.build_request("POST", self._url, json=body)
        try:
            answer = await self._client.send(asked, stream=True)
            self._is_well = True
            if answer.status_code == 200 and body.get("stream"):
                return StreamingResponse(_parts(answer), media_type="text/event-stream")
            try:
                content = await answer.aread()
            finally:
                await answer.aclose()
        except httpx2.HTTPError as fault:
            self._is_well = False
            raise Refusal(502, f"llama.cpp does not answer ({type(fault).__name__}). Start the server again.") from None
        if answer.status_code != 200:
            raise _refusal(answer.status_code, content)
        return JSONResponse(json.loads(content))


async def _parts(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The events, until they end or the client leaves: then llama.cpp sees the connection close, and stops writing."""
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def _refusal(status: int, content: bytes) -> Refusal:
    try:
        error = json.loads(content)["error"]
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, LookupError, TypeError):
        message, kind = content.decode(errors="replace")[:500], None
    # llama.cpp answers 500 to a schema or a template it cannot use, which the request brought
    return Refusal(status, message, code="context_length_exceeded" if kind == "exceed_context_size_error" else None)
