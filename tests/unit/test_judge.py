"""make judge: a language model behind a local endpoint rates pairs in both orders."""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from commands import judge
from stages.lib import chat_endpoint, comparison, config, files, ratings, records
from tests.hub_stub import listening
from tests.unit.test_evaluation_page import SETTINGS, prediction

KEY = "sk-never-written"


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "the reference"}]


class Endpoint:
    """Prefers the answer that holds a word; without one it prefers answer 1."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.prefers: str | None = "blue"
        self.url = ""

    def answer(self, text: str) -> str:
        first = text.partition("### Answer 1")[2].partition("### Answer 2")[0]
        chosen = 1 if self.prefers is None or self.prefers in first else 2
        return f"At first sight Verdict: tie, but on reflection\n**Verdict: {chosen}**"


@pytest.fixture
def endpoint(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """An endpoint, and the outputs of a pipeline in which it can judge four pairs."""
    monkeypatch.setattr(chat_endpoint, "WAITS_S", ())
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(config, "load", lambda schema: schema(SETTINGS))
    rows = [records.make(turns(number), group=str(number), source="s", task="t") for number in range(4)]
    records.write(judge.TEST, rows)
    predictions = [
        prediction(arm, number, f"{word} {number}", id=row["id"], reference="the reference")
        for arm, word in (("fewshot", "amber"), ("tuned", "blue"))
        for number, row in enumerate(rows)
    ]
    judge.PREDICTIONS.parent.mkdir(parents=True)
    files.write_rows(judge.PREDICTIONS, predictions, comparison.PREDICTIONS)
    found = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.asked.append(body)
            found.keys.add(self.headers["Authorization"])
            content = found.answer(body["messages"][1]["content"])
            text = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with listening(Handler) as address:
        found.url = f"{address}/v1"
        yield found


def scored() -> ratings.Score:
    shown = ratings.pairs(files.read_rows(judge.PREDICTIONS), seed=SETTINGS.seed)
    return ratings.summarise(ratings.read(), shown, SETTINGS).scores[0]


def test_an_answer_that_both_orders_prefer_wins(endpoint: Endpoint) -> None:
    assert judge.main(["--model", "org/m:1", "--url", endpoint.url]) == 0
    assert Path("data/ratings/judge-org-m-1.json").exists()
    assert len(endpoint.asked) == 8
    assert (scored().rater, scored().kind, scored().wins, scored().same_place) == ("judge-org-m-1", "model", 4, 0.0)
    text = endpoint.asked[0]["messages"][1]["content"]
    assert re.match(
        r"### Question\n\[user\]\nquestion \d\n\n### Reference answer\nthe reference\n\n### Answer 1\n", text
    )


def test_a_judge_that_prefers_a_place_gives_ties_and_is_seen(endpoint: Endpoint) -> None:
    endpoint.prefers = None
    assert judge.main(["--model", "m", "--url", endpoint.url]) == 0
    assert (scored().ties, scored().same_place) == (4, 1.0)


def test_responses_are_recorded_and_not_asked_for_again_and_the_key_is_written_nowhere(endpoint: Endpoint) -> None:
    assert judge.main(["--model", "m", "--url", endpoint.url]) == 0
    first = Path("data/ratings/judge-m.json").read_bytes()
    assert judge.main(["--model", "m"]) == 0
    assert len(endpoint.asked) == 8
    assert Path("data/ratings/judge-m.json").read_bytes() == first
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert not [path for path in Path().rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_response_without_a_verdict_is_counted_and_left_out(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "answer", lambda text: "I like both." if "blue 2" in text else "Verdict: 1")
    assert judge.main(["--model", "m", "--url", endpoint.url]) == 1
    assert "3 pairs judged, 0 alike in both orders, 1 without a verdict" in capsys.readouterr().out
    assert len(ratings.read()) == 3


def test_without_predictions_or_endpoint_one_message_says_what_to_do(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge.main(["--model", "m"]) == 2
    assert "8 responses are not recorded, expected all. Give --url or --gguf." in capsys.readouterr().err
    judge.PREDICTIONS.unlink()
    assert judge.main(["--model", "m", "--url", endpoint.url]) == 2
    assert "predictions.parquet: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("responses", "found"),
    [
        (["Verdict: 1", "Verdict: 2"], ["left", "left"]),
        (["**Verdict:** Answer 2", "verdict: tie."], ["right", "tie"]),
        (["Verdict: 1", "none"], None),
        (["Verdict: 12", "Verdict: 1"], None),
    ],
)
def test_verdicts_are_read_and_sides_named_as_on_the_page(responses: list[str], found: list[str] | None) -> None:
    assert judge.sides(responses) == found
