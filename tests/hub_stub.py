"""A stand-in for the Hugging Face hub on this machine: a few repositories held in memory, over HTTP."""

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stub serves: `files[kind/id][name]`; `refused[kind/id]` is a status, and an error code of the hub's.

    private: the models nobody else sees. commits: their messages. A file is taken as the hub takes one: small ones in
    the commit, GGUF and safetensors by git-lfs before it.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.tokens: set[str] = set()
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}  # by sha256
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
            if rest[:1] == ["resolve"] and "/".join(rest[2:]) not in files:
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
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
                "private": key in hub.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self.answer(json.dumps(info).encode(), 200, {"Content-Type": "application/json"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                key = f"models/{asked['organization']}/{asked['name']}"
                is_new = key not in hub.files
                if is_new and asked["visibility"] == "private":
                    hub.private.add(key)
                hub.files.setdefault(key, {})
                return self.tell({"url": f"{hub.address}/{key.removeprefix('models/')}"}, 200 if is_new else 409)
            if parts == ["api", "validate-yaml"]:
                return self.tell({"warnings": [], "errors": []})
            if parts[-1] == "batch":
                upload = [
                    {**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                return self.tell({"objects": upload})
            key = "/".join(parts[1:4])
            if key in hub.refused:
                return self.tell({"error": "refused"}, hub.refused[key][0])
            if parts[4] == "preupload":
                names = [one["path"] for one in json.loads(body)["files"]]
                kinds = ["lfs" if name.endswith((".gguf", ".safetensors")) else "regular" for name in names]
                found = [
                    {"path": name, "uploadMode": kind, "shouldIgnore": False}
                    for name, kind in zip(names, kinds, strict=True)
                ]
                return self.tell({"files": found})
            for line in map(json.loads, body.splitlines()):
                held, value = hub.files[key], line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "deletedFile":
                    del held[value["path"]]
                else:
                    is_large = line["key"] == "lfsFile"
                    held[value["path"]] = hub.large[value["oid"]] if is_large else b64decode(value["content"])
            return self.tell({"commitUrl": f"{hub.address}/{key}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.answer(b"", 200, {})

        def tell(self, value: dict[str, object], status: int = 200) -> None:
            self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

        def answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
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
