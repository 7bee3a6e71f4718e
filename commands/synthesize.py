"""make synthesize: new rows in the manner of given ones, from any OpenAI-compatible endpoint (docs/synthesis.md).

    python -m commands.synthesize --seeds seeds.jsonl --out data/raw/synthetic --model m --rows 100 --url http://.../v1
    python -m commands.synthesize ... --gguf models/export/m-Q8_0.gguf     a local model, served for the time it takes
    python -m commands.synthesize ...                                      without either: the recorded responses alone

Writes <out>/responses.jsonl, each response before it is looked at, so that a run that was ended goes on where it was;
<out>/rows.jsonl and <out>/report.json are made again from these. Exit 0: all rows asked for; 1: fewer; 2: bad input.
The key of the endpoint comes from the environment, OPENAI_API_KEY, and is written nowhere.
"""

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import pyarrow as pa
from tqdm import tqdm

from stages.lib import files, local_endpoint, records, synthesis
from stages.lib.errors import ConfigError, DataError, ExternalError, PipelineError

TEST = Path("data/splits/test.parquet")
WAITS_S = (1, 4, 16)  # before an endpoint that is busy is asked again
BUSY = (429, 500, 502, 503, 504)
REQUESTS_PER_ROW = 4  # at most, by default: with fewer rows from more requests something is wrong


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(
        prog="synthesize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    seeds = "JSON Lines, or records such as data/splits/train.parquet"
    known.add_argument("--seeds", type=Path, required=True, help=seeds)
    known.add_argument("--out", type=Path, required=True, help="folder for responses, rows and report")
    where = known.add_mutually_exclusive_group()
    where.add_argument("--url", help="base address of the endpoint, such as http://127.0.0.1:8080/v1")
    where.add_argument("--gguf", type=Path, help="a model file to serve here")
    known.add_argument("--model", required=True, help="its name, as the endpoint knows it")
    known.add_argument("--rows", type=_count, required=True, help="how many to make")
    known.add_argument("--requests", type=_count, help=f"at most; {REQUESTS_PER_ROW} for each row")
    known.add_argument("--test", type=Path, help=f"rows not to come near; {TEST} where that exists")
    known.add_argument("--examples", type=_count, default=3, help="seeds shown in a request")
    known.add_argument("--temperature", type=float, default=0.8)
    known.add_argument("--max-tokens", type=_count, default=1024, help="of a response")
    known.add_argument(
        "--max-similarity", type=_share, default=0.6, help="of instructions: Jaccard of their word pairs"
    )
    known.add_argument("--parallel", type=_count, default=1, help="requests in flight")
    known.add_argument("--timeout", type=float, default=300.0, help="for a response, seconds")
    known.add_argument("--seed", type=int, default=42)
    return known


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0, at most 1")
    return share


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        made = make(asked)
    except (PipelineError, OSError) as fault:
        print(f"synthesize: {fault}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{name} {count}" for name, count in sorted(made.counts.items()))
    print(f"{asked.out / 'rows.jsonl'}: {len(made.rows)} of {asked.rows} rows ({counts})")
    return 0 if len(made.rows) == asked.rows else 1


def make(asked: argparse.Namespace) -> synthesis.Sieve:
    """Ask what is not recorded yet, until there are rows enough; write rows and report."""
    settings = synthesis.Settings(
        model=asked.model,
        examples=asked.examples,
        temperature=asked.temperature,
        max_tokens=asked.max_tokens,
        max_similarity=asked.max_similarity,
        seed=asked.seed,
    )
    seeds = synthesis.seeds_of(_rows(asked.seeds))
    if not seeds:
        raise DataError(
            f"{asked.seeds}: no row is one question with one answer (messages, prompt and completion, or instruction "
            f"and output) of at most {synthesis.MAX_EXAMPLE_CHARS} characters. Change --seeds."
        )
    test_file = asked.test or (TEST if TEST.exists() else None)
    test = synthesis.questions_of(_rows(test_file)) if test_file else []
    print(f"{len(seeds)} seeds, to be kept apart from {len(test)} questions of {test_file or 'no test split'}")
    asked.out.mkdir(parents=True, exist_ok=True)
    recorded = Responses(asked.out / "responses.jsonl")
    sieve = synthesis.Sieve(seeds, test, settings)
    numbers = range(asked.requests or REQUESTS_PER_ROW * asked.rows)
    with ExitStack() as stack:
        endpoint = _endpoint(asked, stack)
        pool = stack.enter_context(ThreadPoolExecutor(asked.parallel))
        bar = stack.enter_context(tqdm(total=asked.rows, unit="row", disable=None))
        for start in numbers[:: asked.parallel]:
            requests = [
                synthesis.request(seeds, number, settings) for number in numbers[start : start + asked.parallel]
            ]
            missing = [body for body, _ in requests if body not in recorded]
            if missing and not endpoint:
                break
            for done in [pool.submit(_record, body, endpoint, recorded) for body in missing if endpoint]:
                done.result()
            for body, task in requests:
                sieve.take(*recorded.answer(body), task=task, limit=asked.rows)
            bar.update(len(sieve.rows) - bar.n)
            if len(sieve.rows) == asked.rows:
                break
    files.write_jsonl(asked.out / "rows.jsonl", sieve.rows)
    inputs = {"seeds": files.sha256(asked.seeds), "test": files.sha256(test_file) if test_file else None}
    files.write_json(asked.out / "report.json", {"settings": vars(settings), "sha256": inputs, "counts": sieve.counts})
    return sieve


def _record(body: dict[str, Any], endpoint: "Endpoint", recorded: "Responses") -> None:
    recorded.add(body, endpoint.ask(body), endpoint.name)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, or records."""
    if not path.is_file():
        raise DataError(f"{path}: not found, expected a file of rows. Change --seeds or --test.")
    if path.suffix == ".parquet":
        try:
            return records.read(path)
        except (pa.ArrowException, KeyError) as fault:
            raise DataError(
                f"{path}: no records ({str(fault).splitlines()[0]}), expected those of data/splits."
            ) from None
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as fault:
            raise DataError(f"{path}:{number}: no JSON ({fault}), expected one object a line. Mend the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found a {type(row).__name__}, expected an object with named fields.")
        found.append(row)
    return found


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
        text = response.text.replace(self._key, "<key>") if self._key else response.text
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


def _endpoint(asked: argparse.Namespace, stack: ExitStack) -> Endpoint | None:
    if asked.gguf:
        if not asked.gguf.is_file():
            raise DataError(f"{asked.gguf}: not found, expected a GGUF file. Change --gguf.")
        return Endpoint(stack.enter_context(local_endpoint.serving(asked.gguf)), asked.timeout, stack)
    return Endpoint(asked.url, asked.timeout, stack) if asked.url else None


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
        return synthesis.digest(body) in self._found

    def add(self, body: dict[str, Any], response: dict[str, Any], endpoint: str) -> None:
        request = synthesis.digest(body)
        entry = {"request": request, "response": response, "model": body["model"], "endpoint": endpoint}
        line = json.dumps(entry, sort_keys=True) + "\n"  # in ASCII: half a character in a response is kept as it came
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._found[request] = response

    def answer(self, body: dict[str, Any]) -> tuple[str, bool]:
        """(what the response says, whether it was cut at max_tokens)."""
        choice = self._found[synthesis.digest(body)]["choices"][0]
        content = choice["message"].get("content")
        return content if isinstance(content, str) else "", choice.get("finish_reason") == "length"


if __name__ == "__main__":
    sys.exit(main())
