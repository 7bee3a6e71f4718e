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
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from stages.lib import chat_endpoint, files, records, synthesis
from stages.lib.errors import DataError, PipelineError

TEST = Path("data/splits/test.parquet")
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
    recorded = chat_endpoint.Responses(asked.out / "responses.jsonl")
    sieve = synthesis.Sieve(seeds, test, settings)
    numbers = range(asked.requests or REQUESTS_PER_ROW * asked.rows)
    with ExitStack() as stack:
        endpoint = chat_endpoint.opened(asked.url, asked.gguf, asked.timeout, stack)
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


def _record(body: dict[str, Any], endpoint: chat_endpoint.Endpoint, recorded: chat_endpoint.Responses) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
