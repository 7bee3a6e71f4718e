"""make chat: several models answer one question, each with its own memory."""

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from commands import chat
from tests.hub_stub import listening


@pytest.fixture
def asked() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that streams the model's name and the number of turns, and refuses the question `bad`; what it got."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(body)
            is_bad = body["messages"][-1]["content"] == "bad" and body["model"] == "tuned"
            pieces = [body["model"], f" heard \x1b[2J{len(body['messages'])}"]
            lines = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
            text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
            text = json.dumps({"error": {"message": "no such question"}}) if is_bad else text
            self.send_response(400 if is_bad else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Handler) as address:
        yield f"{address}/v1", got


def talk(url: str, questions: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    return chat.main(["--url", url])


def test_each_model_answers_with_its_own_memory_until_reset(asked, monkeypatch, capsys) -> None:
    url, got = asked
    assert talk(url, "one\ntwo\n/reset\nthree\n/quit\nnever", monkeypatch) == 0
    for model in ("base", "tuned"):
        mine = [[turn["content"] for turn in body["messages"]] for body in got if body["model"] == model]
        assert mine == [["one"], ["one", f"{model} heard \x1b[2J1", "two"], ["three"]]
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["> one", "base: base heard [2J1", "tuned: tuned heard [2J1"]  # nothing steers the terminal


def test_a_refused_question_is_said_forgotten_and_remembered_by_the_others(asked, monkeypatch, capsys) -> None:
    url, got = asked
    assert talk(url, "bad\nnext\n", monkeypatch) == 1
    assert "no such question" in capsys.readouterr().out
    lengths = {body["model"]: len(body["messages"]) for body in got}
    assert lengths == {"base": 3, "tuned": 1}


def test_wide_terminals_show_answers_side_by_side() -> None:
    console = chat.Console(file=io.StringIO(), width=120)
    console.print(chat._columns([chat.Voice("base", text="yes"), chat.Voice("tuned", text="no")]))
    lines = console.file.getvalue().splitlines()
    assert any("base" in line and "tuned" in line for line in lines)
    assert any("yes" in line and "no" in line for line in lines)


def test_no_server_is_one_message(monkeypatch, capsys) -> None:
    assert talk("http://127.0.0.1:9/v1", "hello\n", monkeypatch) == 1
    assert "no answer" in capsys.readouterr().out
