"""Load test of `make serve`: requests per second and latency at 1, 4 and 16 clients, with nothing lost.

    python -m bench.serve                                   the GGUF file that models/export recommends
    python -m bench.serve --adapters tuned=models/adapter   models/base with adapters; requests go to each in turn
    python -m bench.serve --url http://.../v1               a server that runs

Questions are those of data/splits/test.parquet, greedy. First one client asks each alone; what it was told is what the
others have to be told, too. The last line printed is one JSON object; bench/README.md says what its keys mean.
Exit 0: every request answered and counted; 1: not; 2: bad input.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from tqdm import tqdm

from stages.lib import records
from stages.lib.chat_endpoint import Endpoint
from stages.lib.errors import DataError, ExternalError, PipelineError
from stages.lib.serving import process

TEST = Path("data/splits/test.parquet")
CLIENTS = (1, 4, 16)


@dataclass(frozen=True)
class Told:
    """What came back for one question; text None: nothing did. Seconds from the request on."""

    text: str | None
    first_s: float = 0.0
    seconds: float = 0.0


def main() -> int:
    known = argparse.ArgumentParser(
        prog="bench.serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    where = known.add_mutually_exclusive_group()
    where.add_argument("--gguf", help="a model file, as of make serve")
    where.add_argument("--adapters", nargs="+", help="as of make serve")
    where.add_argument("--url", help="of a server that runs")
    known.add_argument("--requests", type=int, default=48, help="at each number of clients")
    known.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    known.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    known.add_argument("--parallel", type=int, default=4, help="answers the server writes at once")
    asked = known.parse_args()
    try:
        found = measure(asked)
    except (PipelineError, OSError) as fault:
        print(f"bench.serve: {fault}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0 if found["lost"] == 0 and found["reconciles"] else 1


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    load = psutil.cpu_percent(3)  # of others, before anything of ours runs
    with ExitStack() as stack:
        if asked.url:
            address, memory = asked.url, None
        else:
            what = ["--adapters", *asked.adapters] if asked.adapters else ["--gguf", asked.gguf] if asked.gguf else []
            address, pid = stack.enter_context(process.started([*what, "--parallel", str(asked.parallel)]))
            memory = Memory(pid, stack)
        models = [model["id"] for model in _get(address, "/v1/models")["data"]]
        bodies = questions(asked.requests, models, asked.max_tokens)
        before = _get(address, "/health")
        endpoint = Endpoint(address, 3600.0, stack)
        ask(endpoint, bodies[:1])  # warm
        alone = ask(endpoint, bodies, "alone")
        rounds: dict[str, Any] = {}
        lost = sum(told.text is None for told in alone)
        for clients in asked.clients:
            started = time.monotonic()
            told = alone if clients == 1 else ask(endpoint, bodies, f"{clients} clients", clients=clients)
            wall_s = sum(one.seconds for one in alone) if clients == 1 else time.monotonic() - started
            lost += 0 if clients == 1 else sum(one.text is None for one in told)
            rounds[str(clients)] = summary(told, wall_s) | {
                "equal": sum(one.text == other.text for one, other in zip(told, alone, strict=True))
            }
        after = _get(address, "/health")
        sent = 1 + asked.requests * len({1, *asked.clients})
        counted = {name: after[name] - before[name] for name in ("answered", "refused", "left")}
        return {
            "models": models,
            "requests": sent,
            "answered": sent - lost,
            "lost": lost,
            "reconciles": counted == {"answered": sent - lost, "refused": 0, "left": 0} and after["running"] == 0,
            "clients": rounds,
            "parallel": asked.parallel,
            "max_tokens": asked.max_tokens,
            "peak_mib": memory.peak_mib if memory else None,
            "cores": len(os.sched_getaffinity(0)),
            "load_of_others": round(load / 100 * os.cpu_count(), 2),
        }


def questions(count: int, models: Sequence[str], max_tokens: int) -> list[dict[str, Any]]:
    """Bodies of requests: the first test rows' questions, to the models in turn."""
    if not TEST.is_file():
        raise DataError(f"{TEST}: not found, expected the test split. Type `make repro`.")
    chats = [turns[:-1] for row in records.read(TEST) if (turns := records.conversation(row))]
    if not chats:
        raise DataError(f"{TEST}: holds no chats, expected some.")
    return [
        {
            "model": models[number % len(models)],
            "messages": [{"role": turn["role"], "content": turn["content"]} for turn in chats[number % len(chats)]],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        for number in range(count)
    ]


def ask(endpoint: Endpoint, bodies: Sequence[dict[str, Any]], what: str = "", *, clients: int = 1) -> list[Told]:
    """Each body once, so many at a time; what came back, in their order."""
    with ThreadPoolExecutor(clients) as pool:
        answers = pool.map(lambda body: _told(endpoint, body), bodies)
        return list(tqdm(answers, what, total=len(bodies), unit="request", disable=None if what else True))


def _told(endpoint: Endpoint, body: dict[str, Any]) -> Told:
    started, first_s, pieces = time.monotonic(), 0.0, []
    try:
        for piece in endpoint.stream(body):
            first_s = first_s or time.monotonic() - started
            pieces.append(piece)
    except ExternalError as fault:
        print(fault, file=sys.stderr)
        return Told(None)
    return Told("".join(pieces), first_s, time.monotonic() - started)


def summary(told: Sequence[Told], wall_s: float) -> dict[str, float]:
    latencies = [one.seconds for one in told if one.text is not None]
    p50, p95 = np.percentile(latencies, [50, 95]) if latencies else (np.nan, np.nan)
    return {
        "requests_per_second": round(len(latencies) / wall_s, 3),
        "p50_s": round(float(p50), 3),
        "p95_s": round(float(p95), 3),
        "first_token_p50_s": round(statistics.median(one.first_s for one in told), 3),
        "characters_per_second": round(sum(len(one.text or "") for one in told) / wall_s, 1),
    }


class Memory:
    """Peak of the server's processes together, MiB, looked at 5 times a second; a page that two share counts once."""

    def __init__(self, pid: int, stack: ExitStack) -> None:
        self.peak_mib = 0
        self._server, self._over = psutil.Process(pid), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        stack.callback(self._over.set)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            try:
                every = [self._server, *self._server.children(recursive=True)]
                used = sum(each.memory_full_info().pss for each in every)
            except psutil.Error:
                continue
            self.peak_mib = max(self.peak_mib, used // 2**20)


def _get(address: str, path: str) -> dict[str, Any]:
    answer = httpx2.get(address.removesuffix("/v1") + path, trust_env=False)
    found: dict[str, Any] = answer.json()
    return found


if __name__ == "__main__":
    sys.exit(main())
