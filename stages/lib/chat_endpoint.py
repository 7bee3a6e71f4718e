"""What answers chats at an OpenAI-compatible address, and a file of what it answered.

The key of the endpoint comes from the environment, OPENAI_API_KEY, and is written nowhere.
"""

import json
import os
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

from stages.lib import local_endpoint, records
from stages.lib.errors import ConfigError, DataError, ExternalError

WAITS_S = (1, 4, 16)  # before an endpoint that is busy is asked again
BUSY = (429, 500, 502, 503, 504)


class Endpoint:
    """Where responses come from; `name` is its address without credentials."""

    def __init__(self, url: str, timeout_s: float, stack: ExitStack) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: found {_bare(url)!r}, expected an address such as http://127.0.0.1:8080/v1")
        self.name = _bare(url)
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))
        is_here = parts.hostname in ("127.0.0.1", "localhost", "::1")  # never through a proxy
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        client = httpx2.Client(headers=headers, timeout=timeout_s, trust_env=not is_here)
        self._client = stack.enter_context(client)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The endpoint's chat completion.

        Raises: ExternalError, when nobody answers, when it refuses, or when it stays busy.
        """
        for wait_s in (*WAITS_S, None):
            try:
                response = self._client.post(self._url, json=body)
            except httpx2.HTTPError as fault:
                raise ExternalError(
                    f"{self.name}: no answer ({type(fault).__name__}). Check --url and that the server runs; what was "
                    "answered so far is kept, the same command goes on from there."
                ) from None
            if response.status_code not in BUSY or wait_s is None:
                break
            time.sleep(wait_s)
        text = self._without_key(response.text)
        try:
            found = json.loads(text)
            is_completion = isinstance(found["choices"][0]["message"], dict)
        except (ValueError, TypeError, LookupError):
            is_completion = False
        if response.status_code != 200 or not is_completion:
            raise ExternalError(
                f"{self.name}: answered with status {response.status_code}: {text[:200]!r}, expected a chat "
                "completion. Check --url (it ends with /v1 for most servers), --model and OPENAI_API_KEY."
            )
        return dict(found)

    def stream(self, body: dict[str, Any]) -> Generator[str]:
        """The endpoint's answer in pieces, as they are written. To close the iterator ends the request.

        Raises: ExternalError, when nobody answers, or when it refuses, in its words.
        """
        try:
            with self._client.stream("POST", self._url, json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    raise ExternalError(f"{self.name}: {_reason(self._without_key(response.text))}")
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ExternalError(f"{self.name}: {event['error']['message']}")
                    for choice in event["choices"]:
                        if piece := choice["delta"].get("content"):
                            yield piece
        except httpx2.HTTPError as fault:
            raise ExternalError(f"{self.name}: no answer ({type(fault).__name__}). Check that it runs.") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


def opened(url: str | None, gguf: Path | None, timeout_s: float, stack: ExitStack) -> Endpoint | None:
    """The endpoint at an address, or a model file served on this machine until the stack closes; None for neither."""
    if gguf:
        if not gguf.is_file():
            raise DataError(f"{gguf}: not found, expected a GGUF file. Change --gguf.")
        return Endpoint(stack.enter_context(local_endpoint.serving(gguf)), timeout_s, stack)
    return Endpoint(url, timeout_s, stack) if url else None


def _reason(text: str) -> str:
    """What an error of OpenAI's shape says, or the text itself."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:200]


def _bare(url: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


class Responses:
    """A file of responses, one a line, by the digest of the request; each is on the disk before it is used."""

    def __init__(self, path: Path) -> None:
        """Raises: DataError, when a line other than the last is damaged; the last may have been cut by a kill."""
        self._path, self._lock = path, threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._found[entry["request"]] = entry["response"]
            except (ValueError, TypeError, LookupError):
                raise DataError(
                    f"{path}:{number}: no recorded response. Remove the line: it is asked for again."
                ) from None

    def __contains__(self, body: dict[str, Any]) -> bool:
        return records.digest(body) in self._found

    def add(self, body: dict[str, Any], response: dict[str, Any], endpoint: str) -> None:
        request = records.digest(body)
        entry = {"request": request, "response": response, "model": body["model"], "endpoint": endpoint}
        line = json.dumps(entry, sort_keys=True) + "\n"  # in ASCII: half a character in a response is kept as it came
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._found[request] = response

    def answer(self, body: dict[str, Any]) -> tuple[str, bool]:
        """(what the response says, whether it was cut at max_tokens)."""
        choice = self._found[records.digest(body)]["choices"][0]
        content = choice["message"].get("content")
        return content if isinstance(content, str) else "", choice.get("finish_reason") == "length"
