"""Stage evaluate: base, base with examples and tuned model answer the same prompts; which is better, how surely.

Reads data/splits, models/base, models/adapter, and for the page plots/train.csv and metrics/dedup_split.json; writes
reports/evaluation (predictions.parquet, index.html) and metrics/evaluate.json. Run it as `python -m stages.evaluate`:
as a path it would hide the library of the same name.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from stages.lib import files, records, stage, tracking
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.numerics import Numerics


@dataclass
class Params:
    """The parameters this stage declares in dvc.yaml."""

    evaluate: Evaluate
    numerics: Numerics


def main(p: Params) -> None:
    # torch is imported once numerics are settled
    from stages.lib import arms, chat, comparison, evaluation_page, fewshot, held_out, models, numerics

    base, adapter, splits = Path("models/base"), Path("models/adapter"), Path("data/splits")
    tokenizer = chat.load_tokenizer(base)
    test, unusable = held_out.usable(tokenizer, records.read(splits / "test.parquet"))
    if not test:
        raise DataError(
            f"{splits}/test.parquet: holds no row to evaluate on (unusable: {dict(unusable)}), expected at least one. "
            "Raise split.test_fraction or split.max_rows.test, or give more data."
        )
    tasks = {row["task"] for row in test}
    examples = fewshot.choose(splits / "train.parquet", tasks, n=p.evaluate.fewshot, seed=p.evaluate.seed)
    resolved = numerics.resolve(p.numerics)
    print(resolved.reason)
    numerics.seed_everything(p.evaluate.seed, p.numerics)
    # A CPU unpacks 4-bit weights anew at every token; unpacked once they cost memory and save most of the time.
    model = models.load_tuned(base, adapter, p.numerics, dense=resolved.device == "cpu")
    found = arms.predict(model, tokenizer, test, examples, p.evaluate, stop_ids=chat.stop_ids(tokenizer, base))
    lines = comparison.compare(found.predictions, p.evaluate)
    metrics = comparison.metrics(lines) | {"rows/test": len(test)}
    metrics |= {f"rows/unusable/{reason}": count for reason, count in unusable.items()}
    if p.evaluate.base_16bit:
        del model
        original = models.load_dense(base, p.numerics)
        for task, loss in arms.losses(original, tokenizer, test, batch_size=p.evaluate.batch_size).items():
            metrics |= {f"test/{task}/loss/base_16bit": loss, f"test/{task}/perplexity/base_16bit": math.exp(loss)}
    page = evaluation_page.render(
        lines,
        found.predictions,
        metrics,
        questions={row["id"]: (records.conversation(row) or [])[:-1] for row in test},
        limits=found.limits,
        curve=files.read_csv(Path("plots/train.csv")),
        counts=files.read_json(Path("metrics/dedup_split.json")),
        model=files.read_json(base / "source.json")["id"],
        p=p.evaluate,
    )
    with files.replacing(Path("reports/evaluation")) as folder:
        files.write_rows(folder / "predictions.parquet", found.predictions, comparison.PREDICTIONS)
        (folder / "index.html").write_text(page, encoding="utf-8")
    print(evaluation_page.verdict(lines))
    tracking.report("evaluate", metrics, {f"evaluate/{name}/wall_s": s for name, s in found.seconds.items()})
    tracking.log_table("answers", evaluation_page.answers_table(found.predictions))
    tracking.log_file(Path("reports/evaluation/index.html"), "reports")


if __name__ == "__main__":
    stage.run("evaluate", main, Params)
