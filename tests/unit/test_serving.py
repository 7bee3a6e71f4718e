"""make serve: one front before two engines; adapters side by side, streams, clients that leave, the way down."""

import asyncio
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file, save_file
from starlette.responses import JSONResponse, Response

from commands import serve
from stages.lib import files
from stages.lib.errors import ConfigError, ModelError
from stages.lib.serving import front, process
from stages.lib.serving.gguf import LlamaCpp
from stages.lib.serving.turns import settled
from tests.conftest import ROOT
from tests.exported import NUMERICS, make_adapter
from tests.hub_stub import listening

QUESTIONS = ("the quick fox", "a lazy dog 1 2 3", "numbers add up to nothing at all over 7 8 9")


@contextmanager
def running(engine: front.Engine, grace_s: float = 10) -> Iterator[tuple[str, front.Server]]:
    """The engine behind its front, in a thread of this process."""
    bound = front.listen("127.0.0.1", 0)
    server = front.Server(front.Front(engine, "127.0.0.1"), grace_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
        bound.close()


def chat(url: str, **body: Any) -> httpx2.Response:
    if "messages" not in body:
        body["messages"] = [{"role": "user", "content": body.pop("question", QUESTIONS[0])}]
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def content(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def health(url: str) -> dict[str, Any]:
    return httpx2.get(f"{url}/health", trust_env=False).json()


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# the base with adapters


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: otherwise it says one word again and again, whatever it is asked."""
    folder = tmp_path_factory.mktemp("sharp") / "base"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "model.safetensors"
    save_file({name: weight * 3 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("adapters") / name for name in ("one", "v2.1")}
    for scale, folder in zip((0.05, 0.2), made.values(), strict=True):
        make_adapter(base, folder, scale=scale)
    return made


@pytest.fixture(scope="module")
def engine(base: Path, folders: dict[str, Path]) -> Iterator[Any]:
    from stages.lib.serving.adapters import Adapters

    made = Adapters(base, folders, NUMERICS, context=512, slots=2)
    yield made
    made.turns.close()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with running(engine) as (address, _):
        yield address


def test_each_adapter_answers_as_it_does_alone_whoever_asks_beside(url, base, folders) -> None:
    from stages.lib import chat as template
    from stages.lib import generation, models

    tokenizer = template.load_tokenizer(base)
    prompts = [template.prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    stop_ids = template.stop_ids(tokenizer, base)
    alone = {"base": models.load_base(base, NUMERICS, dense=True)}
    alone |= {name: models.load_tuned(base, folder, NUMERICS, dense=True) for name, folder in folders.items()}
    expected = {}
    for name, model in alone.items():
        for question, prompt in zip(QUESTIONS, prompts, strict=True):
            (made,) = generation.greedy(model, [prompt], stop_ids=stop_ids, max_new_tokens=8, batch_size=1)
            expected[name, question] = tokenizer.decode(made.ids, skip_special_tokens=True)
    assert all(
        len({expected[name, question] for name in alone}) == 3 for question in QUESTIONS
    )  # else it proves little
    with ThreadPoolExecutor(9) as pool:
        asked = {
            (name, question): pool.submit(chat, url, model=name, question=question, max_tokens=8)
            for name, question in reversed(expected)
        }
    assert {key: content(answer.result()) for key, answer in asked.items()} == expected


def test_a_stream_says_what_the_whole_answer_says(url) -> None:
    whole = chat(url, model="one", max_tokens=20)
    found = events(
        chat(url, model="one", max_tokens=20, stream=True, stream_options={"include_usage": True}).text,
    )
    pieces = [event["choices"][0]["delta"].get("content", "") for event in found[:-1]]
    assert "".join(pieces) == content(whole)
    assert len(list(filter(None, pieces))) > 3
    assert found[-2]["choices"][0]["finish_reason"] == whole.json()["choices"][0]["finish_reason"] == "length"
    assert found[-1]["usage"] == whole.json()["usage"]
    assert whole.json()["usage"]["completion_tokens"] == 20


def test_draws_repeat_with_their_seed(url) -> None:
    drawn = [content(chat(url, model="one", max_tokens=12, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_before_a_stop_text_and_streams_no_part_of_it(url) -> None:
    whole = content(chat(url, model="base", max_tokens=30))
    stop = whole[len(whole) // 2 :][:3]
    stopped = chat(url, model="base", max_tokens=30, stop=[stop])
    assert content(stopped) == whole[: whole.index(stop)]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    found = events(chat(url, model="base", max_tokens=30, stop=stop, stream=True).text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in found) == content(stopped)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("na\ufffd", [], 2), ("one\nEN", ["END"], 4), ("one EN!", ["END"], 7), ("on", [], 2)],
)
def test_what_may_still_change_is_not_sent(text: str, stops: list[str], expected: int) -> None:
    assert settled(text, stops) == expected


def test_a_client_that_leaves_frees_its_slot(url, engine) -> None:
    before = health(url)["left"]
    body = {"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    begun = []
    for _ in range(3):  # of two slots
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False) as answer:
            for _, _ in zip(range(3), filter(None, answer.iter_lines()), strict=False):
                begun += engine.turns._running
    deadline = time.monotonic() + 5
    while (found := health(url))["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (found["running"], found["left"]) == (0, before + 3)
    while engine.turns._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun
    assert all(len(one._ids) < 400 for one in begun)  # nothing was written to the end for nobody
    assert chat(url, model="one", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "three"}, 404, "found 'three', expected one of base, one, v2.1"),
        ({"model": "one", "messages": []}, 400, "messages: found none"),
        ({"model": "one", "question": "0 " * 600}, 400, "context is 512 tokens"),
        ({"model": "one", "max_tokens": 511}, 400, "context is 512 tokens"),
        ({"model": "one", "temperature": "hot"}, 400, "temperature: "),
        ({"model": "one", "tools": []}, 400, "tools: not known"),
        ({"model": "one", "messages": [{"role": "fox", "content": ""}]}, 400, "messages.0.role: "),
        ({"model": "one", "response_format": {"type": "json_schema"}}, 400, "expected a schema"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why_as_openai_does(url, body, status: int, says: str) -> None:
    answer = chat(url, **body)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert says in answer.json()["error"]["message"]


def test_json_that_was_asked_for_fits_its_schema(url) -> None:
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    schema = {
        "type": "object",
        "properties": {"fox": {"enum": ["quick", "brown"]}, "dogs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["fox", "dogs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema}}
    answer = chat(url, model="one", response_format=form, max_tokens=200)
    found = json.loads(content(answer))
    assert found["fox"] in ("quick", "brown")
    assert found["dogs"] in range(10)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_json_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.lib.serving import refusals, structured

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(refusals.Refusal, match="needs llguidance"):
        structured.guides(None, 4, [])({"type": "object"})


def test_adapters_that_do_not_fit_or_share_a_name_are_refused(base, folders, tmp_path: Path) -> None:
    from stages.lib import models
    from stages.lib.serving.adapters import parse

    assert parse(["a=x", "b.2=y=z"]) == {"a": Path("x"), "b.2": Path("y=z")}
    for given in (["a"], ["=x"], ["a="], ["a b=x"]):
        with pytest.raises(ConfigError, match="expected name=folder"):
            parse(given)
    for given in (["base=x"], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="is taken"):
            parse(given)
    with pytest.raises(ModelError, match="no adapter found"):
        models.load_several(base, {"a": folders["one"], "b": tmp_path}, NUMERICS)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("lora", "dora", "whole"), ("prompt_tuning",), ("ia3",)])
def test_adapters_of_other_kinds_answer_as_alone(base: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    import peft
    import torch

    from stages.lib import chat as template
    from stages.lib import generation, models
    from stages.lib.serving.adapters import Adapters

    recipes = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        "whole": lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["model.norm"], task_type="CAUSAL_LM"
        ),
        "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    }
    tokenizer = template.load_tokenizer(base)
    stop_ids = template.stop_ids(tokenizer, base)
    prompt = template.prompt_ids(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
    expected = {}
    for number, kind in enumerate(("base", *kinds)):
        model = models.load_base(base, NUMERICS, dense=True)
        if kind != "base":
            torch.manual_seed(number)
            made = peft.get_peft_model(models.load_dense(base, NUMERICS), recipes[kind]())
            for weight in filter(lambda weight: weight.requires_grad, made.parameters()):
                torch.nn.init.normal_(weight, mean=float(kind == "ia3"), std=0.3)
            made.save_pretrained(tmp_path / kind)
            model = models.load_tuned(base, tmp_path / kind, NUMERICS, dense=True)
        (answer,) = generation.greedy(model, [prompt], stop_ids=stop_ids, max_new_tokens=10, batch_size=1)
        expected[kind] = tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert len(set(expected.values())) == len(expected)
    engine = Adapters(base, {kind: tmp_path / kind for kind in kinds}, NUMERICS, context=512, slots=4)
    with running(engine) as (url, _), ThreadPoolExecutor(4) as pool:
        asked = {kind: pool.submit(chat, url, model=kind, max_tokens=10) for kind in expected}
        assert {kind: content(answer.result()) for kind, answer in asked.items()} == expected
    engine.turns.close()


# the front


class Slow:
    """Answers when it is let."""

    names = ("slow",)

    def __init__(self) -> None:
        self.let = threading.Event()

    def is_well(self) -> bool:
        return True

    async def respond(self, body: dict[str, Any]) -> Response:
        while not self.let.is_set():
            await asyncio.sleep(0.01)
        return JSONResponse({"choices": [{"message": {"content": "late"}}]})


def test_a_server_that_is_stopped_finishes_what_runs_and_refuses_what_comes() -> None:
    slow = Slow()
    with ThreadPoolExecutor() as pool, running(slow) as (url, server):
        first = pool.submit(chat, url)
        while not health(url)["running"]:
            time.sleep(0.01)
        server.handle_exit(signal.SIGTERM, None)
        late = chat(url)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert health(url)["status"] == "stopping"
        slow.let.set()
        assert content(first.result()) == "late"
    assert server.cut == 0


def test_a_request_that_outlasts_the_grace_is_cut_and_counted() -> None:
    with ThreadPoolExecutor() as pool, running(Slow(), grace_s=0.1) as (url, server):
        pool.submit(chat, url)
        while not health(url)["running"]:
            time.sleep(0.01)
        server.handle_exit(signal.SIGTERM, None)
        while not server.cut:
            time.sleep(0.01)
    assert server.cut == 1


def test_what_is_no_chat_is_refused() -> None:
    with running(Slow()) as (url, _):
        address = f"{url}/v1/chat/completions"
        assert (
            httpx2.post(address, content=b"{", trust_env=False).json()["error"]["message"].startswith("The body is no")
        )
        assert httpx2.post(address, content=b"[]", trust_env=False).status_code == 400
        assert httpx2.post(address, content=b"x" * (front.LARGEST_BODY + 1), trust_env=False).status_code == 413
        assert httpx2.get(address, trust_env=False).status_code == 405
        assert httpx2.get(f"{url}/v2", trust_env=False).json()["error"]["type"] == "invalid_request_error"
        assert httpx2.get(f"{url}/health", headers={"Host": "evil.example"}, trust_env=False).status_code == 400
        assert health(url)["refused"] == 3


# a GGUF file


def test_llama_cpp_is_passed_on_and_its_errors_get_the_usual_shape() -> None:
    class Upstream(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"choices": [{"message": {"content": body["model"]}}]}
            if body["messages"][0]["content"] == "long":
                status, answer = (
                    400,
                    {"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}},
                )
            text = json.dumps(answer).encode()
            if body.get("stream"):
                text = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Upstream) as address:
        engine = LlamaCpp(f"{address}/v1", "m")
        with running(engine) as (url, _):
            assert content(chat(url)) == "m"
            assert events(chat(url, stream=True).text) == [{"choices": []}]
            assert chat(url, question="long").json()["error"] == {
                "message": "too long",
                "type": "invalid_request_error",
                "param": None,
                "code": "context_length_exceeded",
            }
    with running(engine) as (url, _):  # its llama.cpp has gone
        assert chat(url).status_code == 502
        assert health(url)["status"] == "failed"


def export(folder: Path, content: bytes, **more: Any) -> Path:
    folder.mkdir()
    file = folder / "m-Q8_0.gguf"
    file.write_bytes(content)
    (folder / "a.gguf").write_bytes(content)
    digests = {name: files.sha256(folder / name) for name in ("a.gguf", "m-Q8_0.gguf")}
    files.write_json(folder / "manifest.json", {"files": digests, **more})
    return file


def test_no_request_is_lost_to_a_connection_that_llama_cpp_ends() -> None:
    class Upstream(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        has_answered = False  # on this connection

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.has_answered:  # the limit of a connection, reached while a request was on its way
                self.close_connection = True
                return
            self.has_answered = True
            text = b'{"choices": [{"message": {"content": "yes"}}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Upstream) as address, running(LlamaCpp(f"{address}/v1", "m")) as (url, _):
        assert [content(chat(url)) for _ in range(3)] == ["yes"] * 3


def test_the_recommended_file_is_served_else_q8_0(tmp_path: Path) -> None:
    assert serve.recommended(export(tmp_path / "old", b"").parent).name == "m-Q8_0.gguf"
    assert serve.recommended(export(tmp_path / "new", b"", recommended="a.gguf").parent).name == "a.gguf"


def test_bad_input_is_one_message_and_status_2(tmp_path: Path, monkeypatch, capsys) -> None:
    def says(*arguments: str) -> str:
        assert serve.main([*arguments, "--port", "0"] if "--port" not in arguments else list(arguments)) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert "models/export/manifest.json: not found" in says()
    assert "no.gguf: not found" in says("--gguf", "no.gguf")
    file = export(tmp_path / "export", b"not one")
    assert "begins with b'not ', expected a GGUF file" in says("--gguf", str(file))
    file.write_bytes(b"GGUF edited")
    assert "--unverified" in says("--gguf", str(file))
    (file.parent / "manifest.json").write_text("{}")
    assert "is no manifest" in says("--gguf", str(file))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in says("--port", port)


@pytest.mark.slow
def test_a_gguf_file_is_served_from_start_to_stop(tiny_model_dir: Path, tmp_path: Path) -> None:
    from stages.lib.export.formats import gguf

    file = tmp_path / "tiny.gguf"
    gguf.convert(tiny_model_dir, file, outtype="f16", name="tiny", pre_tokenizer="gpt-2")
    command = [sys.executable, "-m", "commands.serve", "--gguf", str(file), "--parallel", "2", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split("/v1")[0]
        assert httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"] == "tiny"
        whole = chat(url, max_tokens=12)
        streamed = events(chat(url, max_tokens=12, stream=True).text)
        pieces = [choice["delta"].get("content") or "" for event in streamed for choice in event["choices"]]
        assert "".join(pieces) == content(whole)
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": [17]}}}
        assert json.loads(content(chat(url, max_tokens=30, response_format=form))) == 17
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": True}
        for _ in range(3):
            with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False) as answer:
                next(answer.iter_lines())
        assert content(chat(url, max_tokens=12)) == content(whole)
        assert health(url)["left"] == 3
        with ThreadPoolExecutor() as pool:
            last = pool.submit(chat, url, max_tokens=400)
            while not health(url)["running"]:
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            assert last.result().status_code == 200
        assert server.wait(10) == 0


@pytest.mark.slow
def test_a_server_of_adapters_is_started_and_stopped(base: Path, folders: dict[str, Path], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with process.started(["--base", str(base), "--adapters", f"one={folders['one']}"]) as (address, _):
        assert content(chat(address.removesuffix("/v1"), model="one", max_tokens=4))
