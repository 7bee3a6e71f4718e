"""Stage quantize_export: write every format, load each again, and measure it against the trained model.

The trained model is the 4-bit base with its adapter, as it was evaluated. Reads models/{base,adapter,merged},
data/splits, reports/evaluation, metrics/{evaluate,merge}.json; writes models/export, plots/ladder.csv and
metrics/quantize_export.json.
"""

from dataclasses import dataclass
from pathlib import Path

from stages.lib import files, records, stage, tracking
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.export import Export
from stages.lib.schema.merge import Merge
from stages.lib.schema.numerics import Numerics

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")
SPLITS = Path("data/splits")


@dataclass
class Params:
    base_model: BaseModel
    data: Data
    evaluate: Evaluate
    export: Export
    merge: Merge
    numerics: Numerics


def main(p: Params) -> None:
    from stages.lib import chat, held_out, merging
    from stages.lib.export import ladder, measuring, papers, round_trip, sbom, writing
    from stages.lib.export.formats.exporter import Trained

    if p.export.sbom:
        sbom.check()
    tokenizer = chat.load_tokenizer(BASE)
    stop_ids = chat.stop_ids(tokenizer, BASE)
    merged = files.read_json(Path("metrics/merge.json"))
    name = f"{p.base_model.id.split('/')[-1]}-tuned"
    rows = held_out.rows(SPLITS, tokenizer, p.export.rows)
    predicted = measuring.by_arm(files.read_rows(Path("reports/evaluation/predictions.parquet")))
    test = [row for row in records.read(SPLITS / "test.parquet") if row["id"] in predicted["tuned"]]
    chats = round_trip.expected(SPLITS, tokenizer, stop_ids, p.export.chats)

    with merging.combined(BASE, ADAPTER, p.merge) as adapter, files.replacing(Path("models/export")) as folder:
        trained = Trained(name, BASE, adapter, MERGED, SPLITS, folder, p.export, p.numerics, p.merge)
        written, skipped = writing.write_formats(trained, folder)
        asked, told = measuring.ask(written, trained, test, chats, p.export, p.evaluate)
        found = measuring.measure(written, asked, trained, rows, predicted, p=p.export, e=p.evaluate, n=p.numerics)
        metrics = told.metrics | found.metrics | measuring.of_merge(merged) | {"export/skipped": len(skipped)}
        rungs = ladder.rungs(metrics)
        export = papers.Export(trained, ADAPTER, written, skipped, metrics, rungs)
        papers.write(folder, export, tokenizer, stop_ids, p.base_model, p.data, confidence=p.evaluate.confidence)

    files.write_csv(Path("plots/ladder.csv"), ladder.table(rungs))
    tracking.report("quantize_export", metrics, measured=told.measured | found.measured)


if __name__ == "__main__":
    stage.run("quantize_export", main, Params)
