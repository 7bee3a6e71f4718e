"""What lies beside the exported files: settings of generation, Modelfile, ladder, card, licence, SBOM, manifest.

All of it is written from what was measured before; the manifest names every file, so it comes last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from stages.lib import files, licences
from stages.lib.export import card, ladder, manifest, measuring, modelfile, sbom, writing
from stages.lib.export.formats.exporter import Trained
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data


@dataclass(frozen=True)
class Export:
    """What was exported and how it measured. written: the files; skipped: formats that could not be, with the reason.

    adapter: as training left it, which the papers name; trained.adapter may be a combination of several.
    """

    trained: Trained
    adapter: Path
    written: Sequence[writing.Written]
    skipped: Mapping[str, str]
    metrics: Mapping[str, float]
    rungs: Sequence[ladder.Rung]


def write(
    folder: Path,
    export: Export,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: Sequence[int],
    base_model: BaseModel,
    data: Data,
    *,
    confidence: float,
) -> None:
    """Write them all into the folder of the exported files, and hold the folder to its manifest.

    Raises: GateError, when the Modelfile would not stop where the model does; DataError, when a file changed meanwhile.
    """
    p, base = export.trained, files.read_json(export.trained.base / "source.json")
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(stop_ids)]
    recommended = writing.recommended(export.written)
    settings = modelfile.generation_config(p.merged, tokenizer, stop_ids)
    files.write_json(folder / "generation_config.json", settings)
    pieces = modelfile.pieces(tokenizer, stops) if recommended else None
    if recommended and pieces:
        context = measuring.context(p.merged)
        modelfile.check(folder / recommended, stops, context)
        text = modelfile.write(recommended, pieces, stops, context)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    (folder / "ladder.svg").write_text(ladder.picture(export.rungs), encoding="utf-8")
    card.write(
        folder / "README.md",
        card.Facts(
            name=p.name,
            base=base_model,
            source=base,
            data=data,
            adapter=files.read_json(export.adapter / "adapter_config.json"),
            trained=files.read_json(export.adapter / "trained.json"),
            numerics=p.numerics,
            confidence=confidence,
            evaluated=files.read_json(Path("metrics/evaluate.json")),
            metrics=export.metrics,
            rungs=export.rungs,
            files={str(one.form): one.path.name for one in export.written},
            skipped=export.skipped,
            recommended=recommended,
            stops=stops,
            has_modelfile=pieces is not None,
        ),
    )
    carried = licences.carry(p.base, folder)
    (folder / "LICENSE.md").write_text(card.license_note(base_model, data, carried), encoding="utf-8")
    formats = {rung.name: dict(rung.figures) for rung in export.rungs if rung.name not in ladder.LABELS}
    if p.export.sbom:
        sbom.write(folder, name=p.name, base=base, adapter=export.adapter, splits=p.splits, formats=formats)
    manifest.write(
        folder,
        base=base,
        adapter=export.adapter,
        splits=p.splits,
        formats=formats,
        recommended=recommended,
        skipped=export.skipped,
    )
    manifest.verify(folder)
