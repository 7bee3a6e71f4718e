"""The report on the data: rows in, out and why, splits, duplicates, leakage, languages, lengths, and what is learned.

One self-contained HTML file: no network, no scripts, no times; equal inputs give equal bytes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from stages.lib import languages, packing, page, records

EXAMPLES = 5  # of each kind
LANGUAGES = 12  # named; the others together
ROWS = 20  # rendered
SAMPLE = 2_000  # rows whose language is looked at
MAX_CHARS = 1_500  # of an example's text
SPLITS = ("train", "validation", "test")

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """One stage's rows: taken + added = the sum of parts; `unexplained` is the difference, 0 where totals are right."""

    name: str
    taken: int
    parts: list[tuple[str, int]]
    kept: int  # how many of the parts, the first ones, go on
    added: int = 0  # noisy twins

    @property
    def unexplained(self) -> int:
        return self.taken + self.added - sum(n for _, n in self.parts)

    @property
    def out(self) -> int:
        return sum(n for _, n in self.parts[: self.kept])


@dataclass(frozen=True)
class Rendered:
    """A row as the model reads it: pieces of text, each learned or not."""

    id: str
    task: str
    source: str
    pieces: list[tuple[str, bool]]


def render(
    prepare: Metrics,
    split: Metrics,
    packed: Metrics,
    *,
    rejected: Sequence[Mapping[str, Any]],
    duplicates: Sequence[Mapping[str, Any]],
    contamination: Sequence[Mapping[str, Any]],
    linked: Sequence[Mapping[str, str]],
    lengths: Sequence[Mapping[str, int]],
    labels: Sequence[Mapping[str, Any]],
    spoken: Mapping[str, int],
    rows: Sequence[Rendered],
    max_tokens: int,
) -> str:
    """The page as HTML.

    Args: prepare, split, packed: metrics of prepare, dedup_split and tokenize_pack. rejected: examples, of each code.
        duplicates, contamination: lines of data/splits/duplicates.jsonl and contamination.jsonl. linked: rows of
        data/splits/linked.parquet. lengths, labels: rows
        of plots/lengths.csv and plots/labels.csv. spoken: rows by language, of a sample. rows: of the training split.
    """
    steps = flow(prepare, split, packed)
    return page.fill(
        "data_page.html.jinja",
        headline=headline(prepare, split, packed),
        steps=steps,
        rejected=by_code(rejected),
        rejections=named(prepare, "rejected/"),
        sources=sources(prepare),
        formats=named(prepare, "format/"),
        cleaned=named(prepare, "cleaned/"),
        pii=named(prepare, "pii/"),
        duplicates=duplicates,
        counts=Counter(split),
        removed=named(split, "removed_fraction/"),
        contamination=contamination,
        linked=linked,
        splits=shares(split),
        tasks=tasks(split),
        spoken=most_spoken(spoken),
        sampled=sum(spoken.values()),
        histogram=histogram(lengths),
        labels=labels,
        most=max((line["trained"] + line["not_trained"] for line in labels), default=1),
        packed=Counter(packed),
        packed_splits=[name for name in SPLITS if f"{name}/packs" in packed],
        rows=rows,
        max_tokens=max_tokens,
        whole=whole,
        percent=percent,
        shortened=shortened,
    )


def headline(prepare: Metrics, split: Metrics, packed: Metrics) -> str:
    """What became of the rows, in one sentence."""
    trained, learned = packed["train/tokens/in"], packed["train/tokens/trained"]
    return (
        f"Of {whole(prepare['rows/in'])} rows read, {whole(split['rows/train'])} are for training, "
        f"{whole(split['rows/validation'])} for validation and {whole(split['rows/test'])} for the test; "
        f"{percent(learned / max(trained, 1))} of the training tokens are learned."
    )


def flow(prepare: Metrics, split: Metrics, packed: Metrics) -> list[Step]:
    """Rows in and out of each stage, with the reasons of those that do not go on."""
    rejected = named(prepare, "rejected/")
    dropped = [*named(split, "duplicates/", ("exact", "near", "semantic")), *named(split, "dropped/")]
    steps = [
        Step("prepare", int(prepare["rows/in"]), [("records", int(prepare["rows/out"])), *rejected], 1),
        Step(
            "dedup_split",
            int(split["rows/in"]),
            [*((name, int(split[f"rows/{name}"])) for name in SPLITS), *dropped],
            len(SPLITS),
            added=int(split.get("rows/noisy", 0)),
        ),
    ]
    for name in SPLITS:
        if f"{name}/rows/in" in packed:
            out = [("packed", int(packed[f"{name}/rows/packed"])), *named(packed, f"{name}/rows/dropped/")]
            steps.append(Step(f"tokenize_pack, {name}", int(packed[f"{name}/rows/in"]), out, 1))
    return steps


def named(metrics: Metrics, prefix: str, names: Sequence[str] | None = None) -> list[tuple[str, Any]]:
    """Metrics under a prefix, by the rest of their names, in the order of `names` or of the alphabet."""
    found = {key.removeprefix(prefix): value for key, value in sorted(metrics.items()) if key.startswith(prefix)}
    return [(name, found[name]) for name in (names or found) if name in found]


def sources(prepare: Metrics) -> list[tuple[str, int, int]]:
    """(name, rows in, rows out) of each source."""
    taken = {key.removesuffix("/in"): int(value) for key, value in named(prepare, "source/") if key.endswith("/in")}
    kept = {key.removesuffix("/out"): int(value) for key, value in named(prepare, "source/") if key.endswith("/out")}
    return [(name, n, kept[name]) for name, n in taken.items()]


def shares(split: Metrics) -> list[tuple[str, int, float]]:
    """(split, rows, share of the rows of all splits)."""
    rows = {name: int(split[f"rows/{name}"]) for name in SPLITS}
    return [(name, n, n / max(sum(rows.values()), 1)) for name, n in rows.items()]


def tasks(split: Metrics) -> list[tuple[str, dict[str, int]]]:
    """(task, rows by split)."""
    found: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        for task, n in named(split, f"rows/{name}/"):
            found.setdefault(task, dict.fromkeys(SPLITS, 0))[name] = int(n)
    return sorted(found.items())


def by_code(rejected: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rejected:
        found.setdefault(row["code"], []).append(row)
    return dict(sorted(found.items()))


def most_spoken(spoken: Mapping[str, int]) -> list[tuple[str, int]]:
    """(language, rows), most first, and last all those not among LANGUAGES."""
    ordered = sorted(spoken.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in ordered[LANGUAGES:])
    return ordered[:LANGUAGES] + [("others", rest)] * (rest > 0)


def histogram(lengths: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Rows by length as bars in a box 640 wide and 220 high: the share of its split, one bar a split, side by side."""
    splits = [name for name in lengths[0] if name != "tokens"]
    totals = {name: max(sum(line[name] for line in lengths), 1) for name in splits}
    tallest = max(line[name] / totals[name] for line in lengths for name in splits) or 1.0
    slot = 580 / len(lengths)
    bars, low = [], 0
    for i, line in enumerate(lengths):
        for j, name in enumerate(splits):
            height = 170 * line[name] / totals[name] / tallest
            width = (slot - 4) / len(splits)
            box = {"x": 44 + i * slot + 2 + j * width, "y": 190 - height, "width": width, "height": height}
            title = f"{name}: {whole(line[name])} rows of {low + 1} to {line['tokens']} tokens"
            bars.append({"split": name, "title": title} | {key: round(value, 1) for key, value in box.items()})
        low = line["tokens"]
    ticks = [
        (round(44 + (i + 1) * slot, 1), line["tokens"])
        for i, line in enumerate(lengths[:-1])
        if i % 4 == 3 and i < len(lengths) - 3
    ]
    levels = [(percent(tallest * part / 2), round(190 - 85 * part, 1)) for part in range(3)]
    return {"bars": bars, "ticks": ticks, "levels": levels, "splits": splits, "over": lengths[-1]}


def whole(value: float) -> str:
    return f"{int(value):,}"


def percent(share: float) -> str:
    """A share with as many digits as it is worth: 3.4%, 41%."""
    return f"{100 * share:.1f}%" if 0 < share < 0.1 or 0.995 > share > 0.9 else f"{100 * share:.0f}%"


def shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} ... ({len(text) - MAX_CHARS:,} more characters)"


def examples(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The first lines of a JSON Lines file, EXAMPLES of each value of `key`; none where there is no file."""
    found: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    if not path.exists():
        return found
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            kind = str(row[key]) if key else ""
            seen[kind] += 1
            if seen[kind] <= EXAMPLES:
                found.append(row)
    return found


def linked(path: Path) -> list[dict[str, str]]:
    """The first rows of a table, in its order; none where there is no file."""
    if not path.exists():
        return []
    return [row for batch in pq.ParquetFile(path).iter_batches(EXAMPLES) for row in batch.to_pylist()][:EXAMPLES]


def sample(path: Path, size: int = SAMPLE) -> pa.Table:
    """The rows of a split whose ids come first: ids are hashes, so these are drawn at random, and always the same."""
    ids = pq.read_table(path, columns=["id"])
    first = pc.select_k_unstable(ids, k=min(size, len(ids)), sort_keys=[("id", "ascending")])
    wanted = ids["id"].take(first)
    return pq.read_table(path, filters=pc.field("id") <= pc.max(wanted)).sort_by("id")


def languages_of(found: pa.Table) -> Counter[str]:
    """Rows by the code of the language that most of their text is in; "?" where it cannot be told."""
    counts: Counter[str] = Counter()
    for row in records.rows(found):
        turns = records.conversation(row) or [{"content": row["text"]}]
        text = "\n".join(turn["content"] for turn in turns if turn.get("content") and turn.get("role") != "system")
        counts[languages.language(text) or "?"] += 1
    return counts


def rendered(found: pa.Table, tokens: packing.Tokens, tokenizer: PreTrainedTokenizerFast) -> list[Rendered]:
    """The first rows as they are packed, as text, divided where the learned tokens begin and end."""
    about = {row["id"]: row for row in found.select(["id", "task", "source"]).to_pylist()}
    shown = []
    for i, row_id in enumerate(tokens.row_ids.to_pylist()[:ROWS]):
        ids, trained = (part[tokens.offsets[i] : tokens.offsets[i + 1]] for part in (tokens.ids, tokens.trained))
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1)
        pieces = [(tokenizer.decode(ids[run].tolist()), bool(trained[run[0]])) for run in runs]
        row = about[row_id.split("#")[0]]
        shown.append(Rendered(row_id, row["task"], row["source"], pieces))
    return shown
