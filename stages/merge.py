"""Stage merge: merge the adapter into the base and measure the result against the quantized base + adapter.

Reads models/base, models/adapter, data/splits; writes models/merged and metrics/merge.json.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

from stages.lib import files, stage, tracking
from stages.lib.errors import GateError, ModelError
from stages.lib.schema.merge import Merge
from stages.lib.schema.numerics import Numerics

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")


@dataclass
class Params:
    merge: Merge
    numerics: Numerics


def main(p: Params) -> None:
    from stages.lib import fidelity, held_out, merging, models

    merging.check_mergeable(ADAPTER)
    rows = held_out.conversations(Path("data/splits"), models.load_tokenizer(BASE), p.merge.rows)
    tuned = models.load_tuned(BASE, ADAPTER, p.numerics)
    expected = fidelity.reference(fidelity.of(tuned), rows)
    del tuned
    gc.collect()

    with files.replacing(MERGED) as folder:
        merging.save(merging.merge(BASE, ADAPTER, p.merge.base, p.numerics), BASE, folder, p.merge.dtype)
        gc.collect()
        if merging.is_equal(folder, BASE):
            raise ModelError(f"{MERGED}: weights equal those of {BASE}, expected the adapter's change in them.")
        merged = fidelity.compare(expected, fidelity.of(models.load_dense(folder, p.numerics)))
        if not merged.kl_mean <= p.merge.max_kl:
            raise GateError(
                f"{MERGED}: mean KL to 4-bit base + adapter is {merged.kl_mean:.3g} nats per token over "
                f"{merged.tokens} held-out tokens, expected at most {p.merge.max_kl:g}. "
                "Choose merge.base=dequantized or merge.dtype=float32, or accept the difference with merge.max_kl."
            )
    tracking.report(
        "merge",
        merged.metrics("merge") | {"merge/tokens": merged.tokens, "merge/mib": merging.weights_mib(MERGED)},
    )


if __name__ == "__main__":
    stage.run("merge", main, Params)
