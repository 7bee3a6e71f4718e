"""From a block of a source to checked records: formats, rules and cleaning, one row after the other."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.lib import cleaning, formats, records, rows
from stages.lib.rows import Rejection, Unfit, Unparsed
from stages.lib.schema.data import Data, Source
from stages.lib.sources import reading


@dataclass(frozen=True)
class Outcome:
    """What became of a block. Its rows are those of the table and the rejected ones."""

    source: str
    table: pa.Table
    rejected: list[Rejection]
    counts: Counter[str]


def prepared(block: reading.Block, data: Mapping[str, Data], templates: Mapping[str, str]) -> Outcome:
    """The records of a block, in its order, and what was kept out.

    Args: data: settings by the name of the source (Data.each). templates: of all of them (formats.templates).
    Returns: counts of rows/{in,out,rejected}, rows/out/<task>, rejected/<code>, format/<format>,
        source/<name>/{in,out}, and of what cleaning found; they add up over blocks.
    """
    settings = data[block.source]
    counts: Counter[str] = Counter()
    made: list[dict[str, Any]] = []
    rejected: list[Rejection] = []
    for where, row in reading.parsed(block):
        if block.source:
            where = f"{block.source}/{where}"
        try:
            made.append(record(row, where, block, settings, templates, counts))
        except Unfit as unfit:
            found = cleaning.masked(unfit.row if isinstance(unfit, Unparsed) else row, settings.clean.pii)
            reason = Unfit(unfit.code, cleaning.masked(unfit.reason, settings.clean.pii))
            rejected.append(rows.rejection(where, reason, found))
    counts.update(f"rows/out/{row['task']}" for row in made)
    counts.update(f"rejected/{row.code}" for row in rejected)
    name = block.source or str(settings.source)
    totals = {"in": len(made) + len(rejected), "out": len(made)}
    counts.update({f"rows/{key}": count for key, count in totals.items()})
    counts.update({f"source/{name}/{key}": count for key, count in totals.items()})
    counts["rows/rejected"] += len(rejected)
    return Outcome(block.source, records.table(made), rejected, counts)


def record(
    row: Any, where: str, block: reading.Block, data: Data, templates: Mapping[str, str], counts: Counter[str]
) -> dict[str, Any]:
    """One row as a record.

    Raises: Unfit, when it cannot be one.
    """
    if isinstance(row, Unfit):
        raise row
    if not isinstance(row, Mapping):
        raise Unfit("no_object", f"the row is a {type(row).__name__}, expected an object with named fields")
    draft = formats.draft(row, data, templates)
    content = rows.checked(draft.content, data.max_chars)
    cleaned = cleaning.clean(content, data.clean, counts)
    if cleaned is not content:
        cleaned = rows.checked(cleaned, data.max_chars)
    counts[f"format/{draft.format}"] += 1
    source, meta = block.source or block.name, {"where": where}
    if data.source is Source.python_docs:
        source, meta = block.source or row["source"], row["meta"]
    elif row.get("source") == records.SYNTHETIC:
        source = records.SYNTHETIC
    return records.make(**cleaned, split=draft.split, group=draft.group, source=source, task=draft.task, meta=meta)
