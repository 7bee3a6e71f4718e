"""The routes, the same whatever answers behind them, and the way down: what runs is finished, what comes is refused."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stages.lib.errors import ConfigError
from stages.lib.serving.refusals import Refusal

LARGEST_BODY = 4 * 1024 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Engine(Protocol):
    """Models by name, and their answers."""

    names: Sequence[str]

    async def respond(self, body: dict[str, Any]) -> Response:
        """The answer to a chat completion: JSON, or events where the body asks for a stream.

        Cancelled when the client leaves; a response that streams has its iterator closed instead.
        Raises: Refusal.
        """

    def is_well(self) -> bool:
        """Can it answer?"""


class Front:
    """The application: GET /health, GET /v1/models, POST /v1/chat/completions.

    answered, refused, left: requests so far, by how they ended (left: the client went away before the end).
    """

    def __init__(self, engine: Engine, host: str) -> None:
        self.engine = engine
        self.running = self.answered = self.refused = self.left = 0
        self.stops_at: float | None = None  # time.monotonic() of the end that requests in flight are given
        # A page elsewhere could let a name of its own lead here (DNS rebinding): names other than this machine's lead
        # to no answer.
        hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
        self._app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                Refusal: lambda request, fault: fault.response(),
                404: lambda request, fault: Refusal(404, f"{request.url.path}: no such route.").response(),
                405: lambda request, fault: Refusal(405, f"{request.method}: not for this route.").response(),
                500: lambda request, fault: Refusal(500, "The server failed; its log says why.").response(),
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _health(self, request: Request) -> Response:
        is_well = self.engine.is_well()
        state = "stopping" if self.stops_at is not None else "ok" if is_well else "failed"
        counts = {name: getattr(self, name) for name in ("running", "answered", "refused", "left")}
        return JSONResponse({"status": state, **counts}, 200 if state == "ok" else 503)

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in self.engine.names]
        return JSONResponse({"object": "list", "data": models})

    async def _chat(self, request: Request) -> Response:
        try:
            if self.stops_at is not None:
                raise Refusal(503, "The server is stopping.", code="stopping")
            body = await _body(request)
            _check(body, self.engine.names)
        except Refusal:
            self.refused += 1
            raise
        self.running += 1
        answering = asyncio.ensure_future(self.engine.respond(body))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            response = await answering if answering.done() else None
        except Exception:
            self._ended("refused")
            raise
        except asyncio.CancelledError:
            self._ended("left")
            raise
        finally:
            leaving.cancel()
            answering.cancel()
        if response is None:
            self._ended("left")
            return Response(status_code=499)  # nobody reads it
        return _Counted(response, self)

    def _ended(self, how: str) -> None:
        self.running -= 1
        setattr(self, how, getattr(self, how) + 1)


class _Counted(Response):
    """A response that says how it ended, once it has: sent whole, or not."""

    def __init__(self, response: Response, front: Front) -> None:
        self._response, self._front = response, front
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_whole = False

        async def watched(message: Any) -> None:
            nonlocal is_whole
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._response(scope, receive, watched)
        finally:
            good = self._response.status_code < 400
            self._front._ended("left" if not is_whole else "answered" if good else "refused")


async def _body(request: Request) -> dict[str, Any]:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise Refusal(413, f"The body has more than {LARGEST_BODY} bytes.")
    try:
        body = json.loads(content)
    except ValueError as fault:
        raise Refusal(400, f"The body is no JSON: {fault}.") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"The body is a {type(body).__name__}, expected a JSON object.")
    return body


def _check(body: dict[str, Any], names: Sequence[str]) -> None:
    """Each request says which model it means; where there is one, it need not. And it says something."""
    if len(names) == 1:
        body.setdefault("model", names[0])
    if body.get("model") not in names:
        raise Refusal(
            404,
            f"model: found {body.get('model')!r}, expected one of {', '.join(names)}.",
            code="model_not_found",
            param="model",
        )
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refusal(400, "messages: found none, expected a list of them.", param="messages")


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before any model is loaded; port 0: a free one.

    Raises: ConfigError, when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as fault:
        bound.close()
        raise ConfigError(
            f"--port: cannot listen on {host}:{port} ({fault.strerror or fault}), expected a free port. "
            "Choose another: make serve PORT=8081."
        ) from None
    return bound


class Server(uvicorn.Server):
    """Its own way down closes the port first; here new requests are told 503 while old ones are finished."""

    def __init__(self, front: Front, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                front,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=0.2,  # type: ignore[arg-type]  # seconds, which may be parts of one
            )
        )
        self._front, self._grace_s, self.cut = front, grace_s, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._front.stops_at is None:
            self._front.stops_at = time.monotonic() + self._grace_s
            print(f"{signal.Signals(sig).name}: finishing {self._front.running} requests", file=sys.stderr, flush=True)
        else:
            self._front.stops_at = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        front = self._front
        if front.stops_at is not None and (not front.running or time.monotonic() >= front.stops_at):
            self.cut = front.running
            self.should_exit = True
        return await super().on_tick(counter)


def run(engine: Engine, bound: socket.socket, host: str, *, grace_s: float) -> int:
    """Answer until SIGTERM or SIGINT comes, then finish what runs within grace_s; a second signal ends at once.

    Returns: requests that were cut.
    """
    server = Server(Front(engine, host), grace_s)
    server.run(sockets=[bound])
    return server.cut
