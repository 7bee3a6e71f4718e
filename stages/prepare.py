"""Stage prepare: read the data, check every row, keep what is rejected with its reason.

Writes data/prepared (records as Parquet shards, rejected.jsonl) and metrics/prepare.json.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.lib import engine, environment, files, formats, pii, preparing, progress, records, stage, tracking
from stages.lib.errors import DataError
from stages.lib.rows import Rejection
from stages.lib.schema.data import Data, Source
from stages.lib.sources import reading

FIRST = 5  # rejections that a message shows


@dataclasses.dataclass
class Params:
    data: Data


def main(p: Params) -> None:
    sources, templates = p.data.each(), formats.templates(p.data)
    work = functools.partial(preparing.prepared, data=sources, templates=templates)
    outcomes = engine.ordered_map(work, reading.blocks(p.data))
    with files.replacing(Path("data/prepared")) as folder:
        tallies = write(folder, progress.rows(outcomes, what="prepare", size=lambda outcome: outcome.counts["rows/in"]))
        if faults := [fault for name, data in sources.items() if (fault := too_few(name, data, tallies[name]))]:
            raise DataError("\n".join([*faults, where_they_are(folder / "rejected.jsonl")]))
    tracking.report("prepare", metrics(tallies))


@dataclasses.dataclass
class Tally:
    """What one source came to: its counts, and the first of its rejections."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    first: list[Rejection] = dataclasses.field(default_factory=list)


def write(folder: Path, outcomes: Iterable[preparing.Outcome]) -> Mapping[str, Tally]:
    """Write records and rejections as they come, in bounded memory. Returns: by source."""
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    folder.mkdir()
    with records.Shards(folder) as shards, (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
        for outcome in outcomes:
            shards.write(outcome.table)
            for row in outcome.rejected:
                rejected.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False, sort_keys=True) + "\n")
            tally = tallies[outcome.source]
            tally.counts.update(outcome.counts)
            tally.first += outcome.rejected[: FIRST - len(tally.first)]
    return tallies


def too_few(name: str, data: Data, tally: Tally) -> str:
    """The message for a source of which nothing, or less than promised, can be used; empty for any other."""
    total, rejected = tally.counts["rows/in"], tally.counts["rows/rejected"]
    key, place = {
        Source.local: ("path", data.path),
        Source.hub: ("id", str(data.id)),
        Source.url: ("url", str(data.url)),
        Source.python_docs: ("packages", ", ".join(data.packages)),
    }[data.source]
    key = f"data.sources.{name}.{key}" if name else f"data.{key}"
    place = f"data.sources.{name} ({place})" if name else place
    if not total:
        return f"{place}: holds no row, expected at least one. Change {key}."
    first = "".join(f"\n  {shown(row)}" for row in tally.first)
    codes = ", ".join(f"{count} {code}" for code, count in codes_of(tally.counts))
    if rejected == total:
        return (
            f"{place}: none of {total} rows can be used ({codes}), expected conversations that end with an answer, "
            f"or another format of data/README.md.{first}\n"
            f"Mend the rows, or change data.format, data.columns or {key}."
        )
    if rejected > data.max_rejected_fraction * total:
        return (
            f"{place}: {rejected} of {total} rows cannot be used ({codes}), data.max_rejected_fraction is "
            f"{data.max_rejected_fraction:g}.{first}\nMend the rows, or raise data.max_rejected_fraction to "
            f"{math.ceil(100 * rejected / total) / 100:g}."
        )
    return ""


def codes_of(counts: Counter[str]) -> list[tuple[str, int]]:
    """(code, rows rejected for it), most frequent first."""
    codes = [(key.removeprefix("rejected/"), n) for key, n in counts.items() if key.startswith("rejected/")]
    return sorted(codes, key=lambda pair: (-pair[1], pair[0]))


def shown(row: Rejection) -> str:
    """A rejection in a message: messages are logged, so that nothing personal may stand in them."""
    return f"{row.where}: {row.code}: {pii.redacted(row.reason, list(pii.found(row.reason)))}"


def where_they_are(rejected: Path) -> str:
    """Save the rejections from a run that failed."""
    kept = environment.root() / "runs/rejected.jsonl"
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(rejected, kept)
    return "All rejected rows are in runs/rejected.jsonl."


def metrics(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """rows/in = rows/out + each reason; by task, format and source, and what cleaning found."""
    total: Counter[str] = Counter()
    for tally in tallies.values():
        total.update(tally.counts)
    return dict(total)


if __name__ == "__main__":
    stage.run("prepare", main, Params, start=engine.start)
