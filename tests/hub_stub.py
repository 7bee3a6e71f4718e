"""A stand-in for the Hugging Face hub on this machine: a few repositories held in memory, over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stub serves: `files[kind/id][name]`; `refused[kind/id]` is a status, and an error code of the hub's."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.tokens: set[str] = set()
        self.address = ""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[0] == "api":
                kind, id, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                parts = parts[1:] if kind == "datasets" else parts
                id, rest = "/".join(parts[:2]), parts[2:]
            key = f"{kind}/{id}"
            if key in hub.refused:
                status, code = hub.refused[key]
                return self.answer(b"", status, {"X-Error-Code": code} if code else {})
            if key not in hub.files:
                return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
            if rest[1:2] and rest[1] not in (COMMIT, "main"):
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            files = hub.files[key]
            if rest[:1] == ["resolve"]:
                content = files["/".join(rest[2:])]
                return self.answer(
                    content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                )
            if rest[:1] == ["tree"]:
                listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                return self.answer(json.dumps(listed).encode(), 200, {"Content-Type": "application/json"})
            siblings = [{"rfilename": name} for name in files]
            info = {
                "id": id,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self.answer(json.dumps(info).encode(), 200, {"Content-Type": "application/json"})

        do_HEAD = do_GET

        def answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Handler) as hub.address:
        yield hub


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine that answers with the handler, while the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
