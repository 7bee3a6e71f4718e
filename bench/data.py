"""What the data stages cost: rows are made; prepare, dedup_split and tokenize_pack run on them, a process each.

`python -m bench.data [--rows 1000000]` needs models/base (`dvc repro base_model`). The last line printed is one JSON
object; bench/README.md says what it counts and how to read it.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from bench import rows
from commands import params
from stages.lib import chat, files, records

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "dedup_split", "tokenize_pack")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
OVERRIDES = ("data=local", "pack.max_tokens=2048")
SAMPLES_PER_SECOND = 10
BATCH = 1000  # rows given to the bare tokenizer at once


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak_mib: int


def main() -> None:
    arguments = parsed()
    if arguments.tokenize:
        print(json.dumps(bare_tokenizer(*arguments.tokenize)))
        return
    base = arguments.base.resolve()
    if missing := [name for name in TOKENIZER if not (base / name).is_file()]:
        sys.exit(f"bench.data: {arguments.base}: no {missing[0]}, expected a tokenizer. Type `dvc repro base_model`.")
    found = []
    for size in arguments.sizes or [arguments.rows]:
        with kept(arguments.keep) as folder:
            found.append(measured(folder, base, size, arguments.overrides))
        print(json.dumps(found[-1]), flush=True)
    if arguments.sizes:
        draw(found, ROOT / "bench")


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is removed afterwards."""
    if folder is None:
        with TemporaryDirectory(prefix="bench-data-") as scratch:
            yield Path(scratch)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()


def measured(folder: Path, base: Path, size: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the three stages on so many rows in a folder that looks like the repository to them."""
    started = time.monotonic()
    rows.write(folder / "rows.jsonl", size)
    mib = (folder / "rows.jsonl").stat().st_size >> 20
    print(f"{size:,} rows, {mib:,} MiB, made in {time.monotonic() - started:.0f} s", flush=True)
    params.write(folder / "params.yaml", [*OVERRIDES, f"data.path={folder / 'rows.jsonl'}", *overrides], ROOT / "conf")
    (folder / "models").mkdir(exist_ok=True)
    for link, target in ((folder / "conf", ROOT / "conf"), (folder / "models/base", base)):
        if not link.exists():
            link.symlink_to(target)
    environment = stage_environment(folder)
    make_store(environment["MLFLOW_TRACKING_URI"])

    costs = {stage: run_stage(stage, folder, environment) for stage in STAGES[:2]}
    bare = [tokenized(folder, "even")]
    costs["tokenize_pack"] = run_stage("tokenize_pack", folder, environment)
    bare.append(tokenized(folder, "odd"))
    for stage in STAGES:
        shown = {key: value for key, value in read_metrics(folder, stage).items() if key.count("/") == 1}
        print(f"{stage:<14} {costs[stage].seconds:7.1f} s {costs[stage].peak_mib:6} MiB  {json.dumps(shown)}")
    print(f"bare tokenizer {sum(half['seconds'] for half in bare):7.1f} s  {json.dumps(bare)}")
    if (counted := read_metrics(folder, "prepare")["rows/in"]) != size:
        sys.exit(f"bench.data: prepare counted {counted} rows of {size}")
    packed = read_metrics(folder, "tokenize_pack")
    room = packed["train/tokens/unused_room"]
    held = packed["train/tokens/trained"] + packed["train/tokens/context"]
    return {
        "rows": size,
        "seconds": {stage: round(cost.seconds, 1) for stage, cost in costs.items()},
        "peak_mib": {stage: cost.peak_mib for stage, cost in costs.items()},
        "tokenize_ratio": round(sum(half["seconds"] for half in bare) / costs["tokenize_pack"].seconds, 3),
        "pack_fill": round(held / (held + room), 4),
    }


def stage_environment(folder: Path) -> dict[str, str]:
    """The stages run from this repository's code, with this python, and log to a store of the folder's own."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    return {
        **outer,
        "PYTHONPATH": str(ROOT),
        "PIPELINE_ENV": sys.prefix,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }


def make_store(uri: str) -> None:
    """The tables of an MLflow store take seconds to make; a user's are there already."""
    import mlflow

    mlflow.MlflowClient(tracking_uri=uri).search_experiments()


def read_metrics(folder: Path, stage: str) -> dict[str, float]:
    found: dict[str, float] = files.read_json(folder / f"metrics/{stage}.json")
    return found


def run_stage(stage: str, folder: Path, environment: dict[str, str]) -> Cost:
    """One stage from the start of its process to the end; its peak is that of all its processes together."""
    with (folder / f"{stage}.log").open("w+") as log:
        started = time.monotonic()
        process = psutil.Popen(
            [sys.executable, "-m", f"stages.{stage}"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peak = peak_bytes(process)
        seconds = time.monotonic() - started
        if process.wait():
            log.seek(0)
            sys.exit(f"bench.data: {stage} ended with status {process.returncode}:\n{log.read()[-4000:]}")
    print(f"{stage}: {seconds:.1f} s, {peak >> 20} MiB", flush=True)
    return Cost(seconds, peak >> 20)


def peak_bytes(process: psutil.Popen) -> int:
    """Highest memory of a process and its descendants until it ends, in proportional set size.

    A page that n processes share counts 1/n in each, so that the sum counts it once. Reading it walks all page tables
    (10 ms for 1.5 GiB), which would slow what is measured: it is read when the resident sizes, which are cheap to read
    and never smaller, reach a new height (by 1%).
    """
    peak, highest = 0, 0.0
    while process.poll() is None:
        tree = [process]
        with contextlib.suppress(psutil.Error):
            tree += process.children(recursive=True)
        resident = sum(size_of(each, "rss") for each in tree)
        if resident > highest * 1.01:
            highest = resident
            peak = max(peak, sum(size_of(each, "pss") for each in tree))
        time.sleep(1 / SAMPLES_PER_SECOND)
    return peak


def size_of(process: psutil.Process, kind: str) -> int:
    """Bytes; 0 of a process that has just ended."""
    try:
        found = process.memory_full_info() if kind == "pss" else process.memory_info()
    except (psutil.Error, ProcessLookupError):
        return 0
    return int(getattr(found, kind))


def tokenized(folder: Path, half: str) -> dict[str, float]:
    """The bare tokenizer on half of the batches, in a process of its own, all cores."""
    command = [sys.executable, "-m", "bench.data", "--tokenize", str(folder), half]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bare_tokenizer(folder: str, half: str) -> dict[str, float]:
    """Seconds in `tokenizer(texts)` alone, on what tokenize_pack reads: train and validation, rendered beforehand."""
    tokenizer = chat.load_tokenizer(Path(folder, "models/base"))
    seconds, tokens, number = 0.0, 0, 0
    for split in ("train", "validation"):
        for batch in records.batches(Path(folder, f"data/splits/{split}.parquet"), BATCH):
            number += 1
            if number % 2 == (half == "odd"):
                continue
            messages = [row["messages"] for row in records.rows(batch)]
            texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in messages]
            started = time.perf_counter()
            encoded = tokenizer(texts)
            seconds += time.perf_counter() - started
            tokens += sum(map(len, encoded["input_ids"]))
    return {"seconds": round(seconds, 3), "tokens": tokens}


def draw(found: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write cost against rows, as data_cost.csv and data_cost.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sizes = [entry["rows"] for entry in found]
    with (folder / "data_cost.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rows", *(f"{stage}_{unit}" for unit in ("seconds", "peak_mib") for stage in STAGES)])
        for entry in found:
            writer.writerow(
                [entry["rows"], *(entry[unit][stage] for unit in ("seconds", "peak_mib") for stage in STAGES)]
            )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage in STAGES:
        seconds = [entry["seconds"][stage] for entry in found]
        left.plot(sizes, seconds, marker="o", label=stage)
        right.plot(sizes, [entry["peak_mib"][stage] for entry in found], marker="o", label=stage)
    total = [sum(entry["seconds"].values()) for entry in found]
    per_row = statistics.median(spent / size for spent, size in zip(total, sizes, strict=True))
    left.plot(sizes, [per_row * size for size in sizes], color="gray", linestyle="--", label="in proportion to rows")
    left.plot(sizes, total, color="black", marker=".", label="all three")
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds")
    right.set(xscale="log", xlabel="rows", ylabel="peak of all processes, MiB", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(folder / "data_cost.png", dpi=110, metadata={"Software": None})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], help="10000,100000,...")
    parser.add_argument("--keep", type=Path, help="folder to work in, left as it is afterwards")
    parser.add_argument("--base", type=Path, default=ROOT / "models/base", help="folder with the tokenizer's files")
    parser.add_argument("--tokenize", nargs=2, metavar=("FOLDER", "HALF"), help="measure the bare tokenizer here")
    parser.add_argument("overrides", nargs="*", help="as for dvc exp run -S: runtime.engine=ray")
    return parser.parse_args()


if __name__ == "__main__":
    main()
