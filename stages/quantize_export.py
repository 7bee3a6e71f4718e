"""Stage quantize_export: write every format, load each again, and measure it against the trained model.

The trained model is the 4-bit base with its adapter, as it was evaluated. Reads models/{base,adapter,merged},
data/splits, reports/evaluation, metrics/{evaluate,merge}.json; writes models/export, plots/ladder.csv and
metrics/quantize_export.json.
"""

from dataclasses import dataclass
from pathlib import Path

from stages.lib import files, licences, records, stage, tracking
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
    from stages.lib.export import card, ladder, manifest, measuring, modelfile, round_trip, sbom, writing
    from stages.lib.export.formats.exporter import Trained

    if p.export.sbom:
        sbom.check()
    tokenizer = chat.load_tokenizer(BASE)
    stop_ids = chat.stop_ids(tokenizer, BASE)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(stop_ids)]
    source = files.read_json(BASE / "source.json")
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

        files.write_json(folder / "generation_config.json", modelfile.generation_config(MERGED, tokenizer, stop_ids))
        recommended = writing.recommended(written)
        pieces = modelfile.pieces(tokenizer, stops) if recommended else None
        if recommended and pieces:
            context = measuring.context(MERGED)
            modelfile.check(folder / recommended, stops, context)
            text = modelfile.write(recommended, pieces, stops, context)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        (folder / "ladder.svg").write_text(ladder.picture(rungs), encoding="utf-8")
        card.write(
            folder / "README.md",
            card.Facts(
                name=name,
                base=p.base_model,
                source=source,
                data=p.data,
                adapter=files.read_json(ADAPTER / "adapter_config.json"),
                trained=files.read_json(ADAPTER / "trained.json"),
                numerics=p.numerics,
                confidence=p.evaluate.confidence,
                evaluated=files.read_json(Path("metrics/evaluate.json")),
                metrics=metrics,
                rungs=rungs,
                files={str(one.form): one.path.name for one in written},
                skipped=skipped,
                recommended=recommended,
                stops=stops,
                has_modelfile=pieces is not None,
            ),
        )
        carried = licences.carry(BASE, folder)
        (folder / "LICENSE.md").write_text(card.license_note(p.base_model, p.data, carried), encoding="utf-8")
        by_format = {rung.name: dict(rung.figures) for rung in rungs if rung.name not in ladder.LABELS}
        if p.export.sbom:
            sbom.write(folder, name=name, base=source, adapter=ADAPTER, splits=SPLITS, formats=by_format)
        manifest.write(
            folder,
            base=source,
            adapter=ADAPTER,
            splits=SPLITS,
            formats=by_format,
            recommended=recommended,
            skipped=skipped,
        )
        manifest.verify(folder)

    files.write_csv(Path("plots/ladder.csv"), ladder.table(rungs))
    tracking.report("quantize_export", metrics, measured=told.measured | found.measured)


if __name__ == "__main__":
    stage.run("quantize_export", main, Params)
