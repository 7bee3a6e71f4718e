"""Stage quantize_export: write every format, load each again, and measure it against the merged model.

Reads models/{base,adapter,merged}, data/splits, reports/evaluation, metrics/{evaluate,merge}.json; writes
models/export, plots/formats.csv and metrics/quantize_export.json.
"""

from dataclasses import dataclass
from pathlib import Path

from stages.lib import files, licences, records, stage, tracking
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.export import Export
from stages.lib.schema.numerics import Numerics

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")
SPLITS = Path("data/splits")


@dataclass
class Params:
    base_model: BaseModel
    data: Data
    evaluate: Evaluate
    export: Export
    numerics: Numerics


def main(p: Params) -> None:
    from stages.lib import chat, held_out
    from stages.lib.export import card, manifest, measuring, modelfile, sbom, writing
    from stages.lib.export.formats.exporter import Trained

    if p.export.sbom:
        sbom.check()
    tokenizer = chat.load_tokenizer(MERGED)
    source = files.read_json(BASE / "source.json")
    name = f"{p.base_model.id.split('/')[-1]}-tuned"
    rows = held_out.conversations(SPLITS, tokenizer, p.export.rows)
    predictions = files.read_rows(Path("reports/evaluation/predictions.parquet"))
    predicted = {row["id"]: row for row in predictions if row["arm"] == "tuned"}
    test = [row for row in records.read(SPLITS / "test.parquet") if row["id"] in predicted]

    with files.replacing(Path("models/export")) as folder:
        trained = Trained(name, BASE, ADAPTER, MERGED, SPLITS, folder, p.export, p.numerics)
        written = writing.write_formats(trained, folder)
        asked = measuring.ask(written, trained, test, p.export, p.evaluate)
        found = measuring.measure(written, asked, trained, rows, predicted, p=p.export, e=p.evaluate, n=p.numerics)
        stops = [tokenizer.convert_ids_to_tokens(token) for token in chat.stop_ids(tokenizer, MERGED)]
        recommended = writing.recommended(written)
        pieces = modelfile.pieces(tokenizer, stops) if recommended else None
        if recommended and pieces:
            text = modelfile.write(recommended, pieces, stops, measuring.context(MERGED))
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        card.write(
            folder / "README.md",
            name=name,
            base=p.base_model,
            source=source,
            data=p.data,
            adapter=files.read_json(ADAPTER / "adapter_config.json"),
            evaluated=files.read_json(Path("metrics/evaluate.json")),
            merged=files.read_json(Path("metrics/merge.json")),
            formats=found.table,
            exported=found.metrics,
            gguf=recommended,
            stops=stops,
            has_modelfile=pieces is not None,
        )
        carried = licences.carry(BASE, folder)
        (folder / "LICENSE.md").write_text(card.license_note(p.base_model, carried), encoding="utf-8")
        if p.export.sbom:
            sbom.write(folder, name=name, base=source, adapter=ADAPTER, splits=SPLITS, formats=found.by_format)
        manifest.write(
            folder, base=source, adapter=ADAPTER, splits=SPLITS, formats=found.by_format, recommended=recommended
        )
        manifest.verify(folder)

    files.write_csv(Path("plots/formats.csv"), found.table)
    tracking.report("quantize_export", found.metrics, measured=found.speeds)


if __name__ == "__main__":
    stage.run("quantize_export", main, Params)
