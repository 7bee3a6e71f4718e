"""Stage merge: merge the adapter into the base, and measure the result against base + adapter, quantized and not.

Reads models/base, models/adapter, the folders of merge.adapters, data/splits, reports/evaluation; writes models/merged
and metrics/merge.json. One model at a time is in memory.
"""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

from stages.lib import files, stage, tracking
from stages.lib.errors import GateError
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.merge import Merge
from stages.lib.schema.numerics import Numerics, Quantization

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")


@dataclass
class Params:
    evaluate: Evaluate
    merge: Merge
    numerics: Numerics


def main(p: Params) -> None:
    from stages.lib import beside, chat, merging, models, numerics, overflow
    from stages.lib.comparison import TUNED

    merging.check(ADAPTER, p.merge)
    tokenizer = chat.load_tokenizer(BASE)
    asked = beside.ask(
        Path("data/splits"),
        tokenizer,
        chat.stop_ids(tokenizer, BASE),
        p.evaluate,
        rows=p.merge.rows,
        answers=p.merge.answers,
    )
    predictions = files.read_rows(Path("reports/evaluation/predictions.parquet"))
    is_evaluated = not p.merge.adapters  # where they are several, evaluate knew one of them
    answered = {
        row["id"]: row["answer"]
        for row in predictions
        if is_evaluated and row["arm"] == TUNED and row["stops"] is not None  # written, not chosen among labels
    }
    dense = numerics.resolve(p.numerics).device == "cpu"
    in_16_bit = replace(p.numerics, quantization=Quantization.none)
    expected = {}
    for name, n, known in (("merge", p.numerics, answered), ("merge/16bit", in_16_bit, {})):
        tuned = merging.trained(BASE, ADAPTER, p.merge, n, dense=dense)
        expected[name] = beside.see(asked, tuned, known)
        del tuned
        gc.collect()

    with files.replacing(MERGED) as folder:
        merging.save(merging.merge(BASE, ADAPTER, p.merge, p.numerics), BASE, folder)
        gc.collect()
        whole = models.load_dense(folder, p.numerics)
        overflow.check(whole, asked.rows, str(p.merge.dtype))
        found = beside.see(asked, whole)
        del whole
        merged = beside.closeness(expected["merge"], found)
        if not merged.kl_mean <= p.merge.max_kl:
            raise GateError(
                f"{MERGED}: mean KL to 4-bit base + adapter is {merged.kl_mean:.3g} nats per token over "
                f"{merged.tokens} held-out tokens, expected at most {p.merge.max_kl:g}. "
                "Choose merge.base=dequantized or merge.dtype=float32, or accept the difference with merge.max_kl."
            )
    metrics = {"merge/tokens": merged.tokens, "merge/mib": merging.weights_mib(MERGED)}
    for name, seen in expected.items():
        metrics |= beside.closeness(seen, found).metrics(name)
        metrics |= {f"{name}/{key}": value for key, value in beside.task_metrics(asked, seen, found).items()}
    tracking.report("merge", metrics)


if __name__ == "__main__":
    stage.run("merge", main, Params)
