"""New rows from given ones: what is asked, what is kept, that nothing is asked twice, that no secret is written."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from commands import synthesize
from stages.lib import chat_endpoint, records, synthesis
from stages.lib.synthesis import Seed, Sieve
from tests.hub_stub import listening

SETTINGS = synthesis.Settings(model="m", examples=2, temperature=0.8, max_tokens=64, max_similarity=0.6, seed=42)
SEEDS = [
    Seed("Name a fish that lives in a river.", "Trout.", "short"),
    Seed("Which planet has the widest rings?", "Saturn.", "short"),
    Seed("Say when the bridge was built, in one year.", "1894.", "short"),
    Seed("Write the plural of the noun goose.", "geese", "grammar"),
]
KEY = "secret-of-the-endpoint"
GOOD = "### Instruction\nTell me how bees find their way home.\n### Answer\nBy the sun and by landmarks."


def sieve(test: list[str] | None = None, seeds: list[Seed] = SEEDS) -> Sieve:
    return Sieve(seeds, test or [], SETTINGS)


def pair(instruction: str = "Tell me how bees find their way home.", answer: str = "By the sun.") -> str:
    return f"### Instruction\n{instruction}\n### Answer\n{answer}\n"


def dropped(content: str, *, test: list[str] | None = None, is_cut: bool = False) -> list[str]:
    taking = sieve(test)
    taking.take(content, is_cut, task="short", limit=9)
    assert taking.counts["pairs"] == len(taking.rows) + sum(
        count for name, count in taking.counts.items() if name.startswith("dropped/")
    )
    return [name.removeprefix("dropped/") for name in taking.counts if name.startswith("dropped/")]


def test_seeds_are_read_from_every_form_and_their_order_does_not_matter() -> None:
    spoken = [{"role": "user", "content": "q3"}, {"role": "assistant", "content": "a3"}]
    turns = [{"role": "system", "content": "s"}, *spoken]
    rows: list[dict[str, Any]] = [
        {"prompt": "q1", "completion": " a1\n"},
        {"instruction": "q2", "input": "more", "output": "a2", "task": "t"},
        {"messages": turns},
        {"messages": [*turns, *spoken]},  # two questions
        {"prompt": "q4", "completion": "x" * synthesis.MAX_EXAMPLE_CHARS},
        {"prompt": "q5", "completion": None},
        {"text": "of nothing but text", "messages": None},
        {"prompt": "half a \ud800 sign", "completion": "a"},
        {"messages": "q", "meta": 3},
        {"messages": [None, {"role": "user"}]},
        {"prompt": "q6", "completion": "a6", "source": "synthetic"},
        {"prompt": "q7", "completion": "a7", "meta": {"noise_of": "0"}},
    ]
    expected = [Seed("q1", "a1", "chat"), Seed("q3", "a3", "chat"), Seed("q2\n\nmore", "a2", "t")]
    assert synthesis.seeds_of(rows) == synthesis.seeds_of([*rows[::-1], rows[0]]) == expected


def test_a_request_shows_seeds_of_one_task_and_depends_on_number_and_seed_alone() -> None:
    bodies = [synthesis.request(SEEDS, number, SETTINGS) for number in range(30)]
    assert bodies == [synthesis.request(SEEDS, number, SETTINGS) for number in range(30)]
    assert {task for _, task in bodies} == {"short", "grammar"}
    body, task = next(found for found in bodies if found[1] == "short")
    shown = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
    assert len(shown) == len(set(shown)) == 2
    assert all(any(seed.answer in text for seed in SEEDS if seed.task == task) for text in shown)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.8, 64)
    assert len({body["seed"] for body, _ in bodies}) == 30


@pytest.mark.parametrize(
    ("content", "pairs"),
    [
        (pair("Q", "A"), [("Q", "A")]),
        (
            "Sure!\n## instruction 1:\nQ\n\n## ANSWER 1\nA\nB\n### Instruction\nR\n### Answer\nC",
            [("Q", "A\nB"), ("R", "C")],
        ),
        ("### Instruction\nQ", [("Q", "")]),
        ("### Answer\nA", [("", "A")]),
        ("Instruction: Q, Answer: A", []),
    ],
)
def test_pairs_are_read_from_what_a_model_writes(content: str, pairs: list[tuple[str, str]]) -> None:
    assert synthesis.pairs_of(content) == pairs


def test_a_row_says_that_it_is_synthetic_and_which_task_it_is_of() -> None:
    taking = sieve()
    taking.take(GOOD, False, task="short", limit=1)
    question, answer = "Tell me how bees find their way home.", "By the sun and by landmarks."
    assert taking.rows == [{"prompt": question, "completion": answer, "source": "synthetic", "task": "short"}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pair(answer=""), "format"),
        (pair(answer="half a \ud800 sign"), "format"),
        (pair("Too short."), "length"),
        (pair("word " * 151), "length"),
        (pair(answer="and so on and on " * 20), "repetition"),
        (pair(answer="I'm sorry, but I can't assist with that."), "refusal"),
        (pair(answer="tell me: how BEES find their way home!"), "echo"),
        (pair(synthesis.request(SEEDS, 0, SETTINGS)[0]["messages"][0]["content"].replace("#", "")), "echo"),
        (pair("Which planet has the widest rings, then?"), "seed"),
        (pair("What is the capital city of France?"), "test"),
        (pair() + pair("Tell me how bees find their way home!"), "duplicate"),
    ],
)
def test_what_is_not_worth_keeping_is_left_out_by_its_reason(content: str, why: str) -> None:
    assert dropped(content, test=["What is the capital city of France?"]) == [why]


def test_the_last_pair_of_a_response_that_was_cut_is_left_out() -> None:
    assert dropped(pair(), is_cut=True) == ["cut"]
    assert dropped(pair(), is_cut=False) == []


def test_wording_that_all_seeds_share_does_not_make_a_new_row_their_neighbour() -> None:
    frame = "Answer in one short sentence and name your source: what is a"
    words = "fish stone cloud lamp ship goose tower river cart mill rope".split()
    taking = sieve(seeds=[Seed(f"{frame} {word}?", "It is.", "short") for word in words])
    taking.take(pair(f"{frame} violin?") + pair(f"{frame} goose?"), False, task="short", limit=9)
    assert taking.counts == {"responses": 1, "pairs": 2, "rows": 1, "dropped/seed": 1}


# --- the command, with an endpoint that answers fixed texts


class Stub:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.answer: Callable[[int], tuple[int, str]] = lambda number: (200, completion(GOOD))
        self.url = ""


def completion(content: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]})


def numbered(number: int) -> tuple[int, str]:
    """Every third response is of no use; the others are of different words."""
    topic = " ".join(f"{word}{number}" for word in ("explain", "river", "stone", "cloud"))
    return 200, completion("no pairs here" if number % 3 == 2 else pair(topic, f"It is {topic}."))


@contextmanager
def serving() -> Iterator[Stub]:
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append(body)
            stub.keys.add(self.headers.get("Authorization", ""))
            is_known = self.path.partition("?")[0] == "/v1/chat/completions"
            status, text = stub.answer(body["seed"] - SETTINGS.seed) if is_known else (404, "")
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Handler) as address:
        stub.url = f"{address}/v1"
        yield stub


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(chat_endpoint, "WAITS_S", (0.0, 0.0))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as stub:
        stub.answer = numbered
        yield stub


def arguments(url: str | None = None, *more: str) -> list[str]:
    rows = [{"prompt": seed.question, "completion": seed.answer, "task": seed.task} for seed in SEEDS]
    Path("seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    address = ["--url", url] if url else []
    return ["--seeds", "seeds.jsonl", "--out", "out", "--model", "m", "--rows", "6", *address, *more]


def written() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


@pytest.mark.usefixtures("in_tmp")
def test_rows_are_made_recorded_and_made_again_from_the_record_alone(endpoint: Stub) -> None:
    assert synthesize.main(arguments(endpoint.url)) == 0
    first = written()
    assert len(first["rows.jsonl"].splitlines()) == 6
    assert len(endpoint.asked) == len(first["responses.jsonl"].splitlines()) == 8
    counts = json.loads(first["report.json"])["counts"]
    assert counts == {"pairs": 6, "responses": 8, "responses/without_pairs": 2, "rows": 6}
    Path("out/rows.jsonl").unlink()
    assert synthesize.main(arguments()) == 0  # without an endpoint
    assert written() == first
    assert len(endpoint.asked) == 8


@pytest.mark.usefixtures("in_tmp")
def test_requests_in_flight_together_make_the_same_rows(endpoint: Stub) -> None:
    assert synthesize.main(arguments(endpoint.url)) == 0
    alone = written()
    assert synthesize.main(arguments(endpoint.url, "--out", "out2", "--parallel", "3")) == 0
    for name in ("rows.jsonl", "report.json"):
        assert (Path("out2") / name).read_bytes() == alone[name]


@pytest.mark.usefixtures("in_tmp")
def test_a_killed_run_asks_only_what_is_not_recorded_and_ends_with_the_same_bytes(endpoint: Stub) -> None:
    fifth = threading.Event()

    def stuck(number: int) -> tuple[int, str]:
        if number == 4:
            fifth.set()
            time.sleep(0.2)
        return numbered(number)

    endpoint.answer = stuck
    command = [sys.executable, "-m", "commands.synthesize", *arguments(endpoint.url)]
    root = Path(synthesize.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        assert fifth.wait(60)
        running.send_signal(signal.SIGKILL)
    assert len(Path("out/responses.jsonl").read_bytes().splitlines()) == 4
    with Path("out/responses.jsonl").open("ab") as file:
        file.write(b'{"endpoint": "http://127.0.0.1", "mod')  # a line that the kill cut
    endpoint.answer, endpoint.asked = numbered, []
    assert synthesize.main(arguments(endpoint.url)) == 0
    assert len(endpoint.asked) == 4
    resumed = written()
    assert synthesize.main(arguments(endpoint.url, "--out", "whole")) == 0
    assert {name: (Path("whole") / name).read_bytes() for name in resumed} == resumed


@pytest.mark.usefixtures("in_tmp")
def test_key_and_credentials_go_to_the_endpoint_and_nowhere_else(
    endpoint: Stub, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint.answer = lambda number: (200, completion(f"{GOOD} You sent {KEY}."))
    address = endpoint.url.replace("//", "//ada:lovelace@") + "?token=abc"
    assert synthesize.main(arguments(endpoint.url, "--requests", "1")) == 1
    assert endpoint.keys == {f"Bearer {KEY}"}
    endpoint.answer = lambda number: (401, f"wrong key {KEY}")
    assert synthesize.main(arguments(address, "--out", "out2")) == 2
    said = "".join(capfd.readouterr())
    everything = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file()) + said.encode()
    for secret in (KEY, "lovelace", "token=abc"):
        assert secret.encode() not in everything
    assert "wrong key <key>" in said


@pytest.mark.usefixtures("in_tmp")
def test_test_rows_are_kept_apart_from_without_being_asked(endpoint: Stub, capfd: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "explain0 river0 stone0 cloud0"}, {"role": "assistant", "content": "Yes."}]
    row = records.make(turns, group="", source="a", task="short")
    Path("data/splits").mkdir(parents=True)
    pq.write_table(records.table([row]), "data/splits/test.parquet")
    assert synthesize.main(arguments(endpoint.url)) == 0
    assert "1 questions of data/splits/test.parquet" in capfd.readouterr().out
    assert b"explain0" not in Path("out/rows.jsonl").read_bytes()
    assert json.loads(Path("out/report.json").read_bytes())["counts"]["dropped/test"] == 1


@pytest.mark.usefixtures("in_tmp")
def test_a_busy_endpoint_is_asked_again_and_the_answer_is_no_when_rows_are_missing(endpoint: Stub) -> None:
    busy = iter([429, 503])
    endpoint.answer = lambda number: (status, "") if (status := next(busy, 0)) else (200, completion(GOOD))
    assert synthesize.main(arguments(endpoint.url, "--requests", "3")) == 1
    assert len(endpoint.asked) == 5
    assert len(Path("out/rows.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "none.jsonl"], "none.jsonl: not found, expected a file of rows. Change --seeds"),
        (["--seeds", "bad.jsonl"], "bad.jsonl:2: no JSON"),
        (["--seeds", "texts.jsonl"], "texts.jsonl: no row is one question with one answer"),
        (["--url", "127.0.0.1:80"], "--url: found '127.0.0.1:80', expected an address such as http://"),
        (["--url", "http://127.0.0.1:1/v1"], "http://127.0.0.1:1/v1: no answer (ConnectError). Check --url"),
        (["--out", "bad.jsonl"], "bad.jsonl"),
        (["--gguf", "none.gguf"], "none.gguf: not found, expected a GGUF file. Change --gguf"),
    ],
)
@pytest.mark.usefixtures("in_tmp")
def test_bad_input_is_one_message_and_exit_2(more: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt"\n')
    Path("texts.jsonl").write_text('{"text": "of nothing but text"}\n')
    assert synthesize.main(arguments(None, *more)) == 2
    said = capfd.readouterr().err
    assert said.startswith("synthesize: ")
    assert message in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "0"], "--rows: found '0', expected a whole number, 1 or more"),
        (["--max-similarity", "2"], "--max-similarity: found '2', expected a number above 0, at most 1"),
        (["--url", "http://h/v1", "--gguf", "m.gguf"], "--gguf: not allowed with argument --url"),
    ],
)
@pytest.mark.usefixtures("in_tmp")
def test_a_bad_command_line_ends_with_exit_2(more: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        synthesize.main(arguments(None, *more))
    assert message in capfd.readouterr().err


@pytest.mark.usefixtures("in_tmp")
def test_a_damaged_record_is_named_by_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/responses.jsonl").write_text("{}\n")
    assert synthesize.main(arguments()) == 2
    assert "out/responses.jsonl:1: no recorded response. Remove the line" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_tmp")
def test_a_model_served_here_answers_and_its_responses_are_recorded(tiny_model_dir: Path) -> None:
    from stages.lib.export.formats import gguf

    gguf.convert(tiny_model_dir, Path("tiny.gguf"), outtype="f16", name="tiny", pre_tokenizer="gpt-2")
    code = synthesize.main(arguments(None, "--gguf", "tiny.gguf", "--requests", "2", "--max-tokens", "16"))
    assert code == 1  # a random model writes no pairs
    entries = [json.loads(line) for line in Path("out/responses.jsonl").read_text().splitlines()]
    assert [entry["response"]["choices"][0]["message"]["role"] for entry in entries] == ["assistant"] * 2
    assert str(Path.cwd()) not in Path("out/responses.jsonl").read_text()
    first = written()
    assert synthesize.main(arguments(None, "--requests", "2", "--max-tokens", "16")) == 1
    assert written() == first
