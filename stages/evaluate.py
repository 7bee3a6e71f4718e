"""Stage evaluate: base, base with examples and tuned model answer the same prompts; which is better, how surely.

Reads data/splits, models/base, models/adapter, the folders of evaluate.others, and for the page plots/train.csv and
metrics/dedup_split.json; writes reports/evaluation (predictions.parquet, comparisons.csv, slices.csv, index.html) and
metrics/evaluate.json. Run it as `python -m stages.evaluate`: as a path it would hide the library of the same name.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stages.lib import files, rating_page, ratings, records, stage, tracking
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.numerics import Numerics

OF_THE_COMPARISON = ("others", "bootstrap_samples", "confidence")  # what no arm's own answers depend on
BASE, ADAPTER, SPLITS = Path("models/base"), Path("models/adapter"), Path("data/splits")


@dataclass
class Params:
    """The parameters this stage declares in dvc.yaml."""

    evaluate: Evaluate
    numerics: Numerics


def main(p: Params) -> None:
    # torch is imported once numerics are settled
    from stages.lib import (
        arms,
        chat,
        comparison,
        evaluation_page,
        fewshot,
        general,
        held_out,
        models,
        numerics,
        others,
        untrained,
    )

    others.check(p.evaluate.others)
    tokenizer = chat.load_tokenizer(BASE)
    test, unusable = held_out.usable(tokenizer, records.read(SPLITS / "test.parquet"))
    if not test:
        raise DataError(
            f"{SPLITS}/test.parquet: holds no row to evaluate on (unusable: {dict(unusable)}), expected at least one. "
            "Raise split.test_fraction or split.max_rows.test, or give more data."
        )
    tasks = {row["task"] for row in test}
    examples = fewshot.choose(SPLITS / "train.parquet", tasks, n=p.evaluate.fewshot, seed=p.evaluate.seed)
    resolved = numerics.resolve(p.numerics)
    print(resolved.reason)
    numerics.seed_everything(p.evaluate.seed, p.numerics)
    described, found = arms.describe(tokenizer, test, SPLITS / "train.parquet"), arms.Predicted()
    # A CPU unpacks 4-bit weights anew at every token; unpacked once they cost memory and save most of the time.
    dense = resolved.device == "cpu"
    model = models.load_tuned(BASE, ADAPTER, p.numerics, dense=dense)
    stop_ids = chat.stop_ids(tokenizer, BASE)
    asked = {name: value for name, value in asdict(p.evaluate).items() if name not in OF_THE_COMPARISON}
    determining = {"asked": asked, "resolved": asdict(resolved), "arithmetic": numerics.arithmetic()}
    store = untrained.folder(determining, p.numerics)
    base = arms.Arm("base", model, tokenizer, stop_ids, adapter_off=True)
    for arm in (base, replace(base, name="fewshot", examples=examples)):
        found.add(arms.predict_once(store, arm, test, described, p.evaluate))
    found.add(arms.predict(arms.Arm("tuned", model, tokenizer, stop_ids), test, described, p.evaluate))
    forgetting = general.compare(model, tokenizer, p.evaluate, store)
    del model, base, arm
    for name, entry in sorted(p.evaluate.others.items()):
        other = arms.load(name, Path(entry["path"]), BASE, p.numerics)
        found.add(arms.predict(other, test, described, p.evaluate))
        del other
    found.sort()
    lines, slices = comparison.compare(found.predictions, p.evaluate), comparison.slices(found.predictions, p.evaluate)
    metrics = comparison.metrics(lines) | general.metrics(forgetting) | {"rows/test": len(test)}
    metrics |= {f"rows/unusable/{reason}": count for reason, count in unusable.items()}
    if p.evaluate.base_16bit:
        losses = untrained.once(
            store, "base_16bit", lambda: arms.losses(models.load_dense(BASE, p.numerics), tokenizer, test, p.evaluate)
        )
        for task, loss in losses.items():
            metrics |= {f"test/{task}/loss/base_16bit": loss, f"test/{task}/perplexity/base_16bit": math.exp(loss)}
    rated = ratings.summarise(ratings.read(), ratings.pairs(found.predictions, seed=p.evaluate.seed), p.evaluate)
    metrics |= ratings.metrics(rated)
    questions = {row["id"]: (records.conversation(row) or [])[:-1] for row in test}
    page = evaluation_page.render(
        lines,
        found.predictions,
        metrics,
        questions=questions,
        limits=found.limits,
        curve=files.read_csv(Path("plots/train.csv")),
        counts=files.read_json(Path("metrics/dedup_split.json")),
        model=files.read_json(BASE / "source.json")["id"],
        p=p.evaluate,
        slices=slices,
        forgetting=forgetting,
        rated=rated,
    )
    with files.replacing(Path("reports/evaluation")) as folder:
        files.write_rows(folder / "predictions.parquet", found.predictions, comparison.PREDICTIONS)
        files.write_csv(folder / "comparisons.csv", comparison.table([*lines, *forgetting]))
        if slices:
            files.write_csv(folder / "slices.csv", comparison.table(slices))
        (folder / "index.html").write_text(page, encoding="utf-8")
        rate = rating_page.render(found.predictions, questions, p.evaluate)
        (folder / "rate.html").write_text(rate, encoding="utf-8")
    print(evaluation_page.verdict(lines, forgetting))
    if rated.ignored:
        print(f"{ratings.FOLDER}: {rated.ignored} choices are of answers since changed and are not counted")
    tracking.report("evaluate", metrics, found.measured())
    tracking.log_table("answers", evaluation_page.answers_table(found.predictions))
    for name in ("index.html", "rate.html"):
        tracking.log_file(Path("reports/evaluation") / name, "reports")


if __name__ == "__main__":
    stage.run("evaluate", main, Params)
