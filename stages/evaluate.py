"""Stage evaluate: base, base with examples and tuned model answer the same prompts; which is better, how surely.

Reads data/splits, models/base, models/adapter, and for the page plots/train.csv and metrics/dedup_split.json; writes
reports/evaluation (predictions.parquet, index.html) and metrics/evaluate.json. Run it as `python -m stages.evaluate`:
as a path it would hide the library of the same name.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib import files, stage, tracking
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.numerics import Numerics


@dataclass
class Params:
    """The parameters this stage declares in dvc.yaml."""

    evaluate: Evaluate
    numerics: Numerics


def main(p: Params) -> None:
    from stages.lib import comparison, evaluation_page

    test = sorted(files.read_rows(Path("data/splits/test.parquet")), key=lambda row: str(row["id"]))
    train = files.read_rows(Path("data/splits/train.parquet"))
    if not test:
        raise DataError(
            "data/splits/test.parquet: holds no rows, expected at least one to evaluate on. "
            "Raise split.test_fraction or split.max_rows.test, or give more data."
        )
    predictions, limits = predict(p, test, train)
    lines = comparison.compare(predictions, p.evaluate, seed=p.evaluate.seed)
    page = evaluation_page.render(
        lines,
        predictions,
        questions={row["id"]: row["messages"][:-1] for row in test},
        limits=limits,
        curve=files.read_csv(Path("plots/train.csv")),
        counts=files.read_json(Path("metrics/dedup_split.json")),
        model=files.read_json(Path("models/base/source.json"))["id"],
        p=p.evaluate,
    )
    with files.replacing(Path("reports/evaluation")) as folder:
        files.write_rows(folder / "predictions.parquet", predictions, comparison.PREDICTIONS)
        (folder / "index.html").write_text(page, encoding="utf-8")
    print(evaluation_page.verdict(lines))
    tracking.report("evaluate", comparison.metrics(lines) | {"rows/test": len(test)})
    tracking.log_table("answers", evaluation_page.side_by_side(predictions))
    tracking.log_file(Path("reports/evaluation/index.html"), "reports")


def predict(
    p: Params, test: list[dict[str, Any]], train: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of comparison.PREDICTIONS, sorted, and the answer limit of each task in tokens."""
    from stages.lib import arms, chat, fewshot, models, numerics
    from stages.lib.measures import SCORES, applicable, library

    base, adapter = Path("models/base"), Path("models/adapter")
    resolved = numerics.resolve(p.numerics)
    print(resolved.reason)
    numerics.seed_everything(p.evaluate.seed, p.numerics)
    tokenizer = chat.load_tokenizer(base)
    stop_ids = chat.stop_ids(tokenizer, base)
    # Unpacking 4-bit weights at every token costs a CPU more than keeping them unpacked.
    model = models.load_tuned(base, adapter, p.numerics, dense=resolved.device == "cpu")
    predictions, limits, speeds = [], {}, {}
    for task in sorted({row["task"] for row in test}):
        rows = [row for row in test if row["task"] == task]
        examples = fewshot.choose(train, task, n=p.evaluate.fewshot, seed=p.evaluate.seed)
        names = applicable([row["messages"][-1]["content"] for row in rows])
        for arm in arms.ARMS:
            asked = arms.questions(tokenizer, rows, examples if arm == "fewshot" else ())
            limits[task] = arms.answer_limit(
                asked, margin=p.evaluate.answer_margin, max_new_tokens=p.evaluate.max_new_tokens
            )
            started = time.monotonic()
            with arms.weights_of(model, arm):
                answered = arms.answer(
                    model,
                    tokenizer,
                    asked,
                    stop_ids=stop_ids,
                    max_new_tokens=limits[task],
                    batch_size=p.evaluate.batch_size,
                )
            speeds[f"evaluate/{task}/{arm}/wall_s"] = time.monotonic() - started
            print(f"{task}, {arm}: {len(asked)} rows in {speeds[f'evaluate/{task}/{arm}/wall_s']:.0f} s")
            scores = library.score_rows(names, [a.answer for a in answered], [q.reference for q in asked])
            predictions += [
                {
                    "arm": arm,
                    "id": question.row["id"],
                    "task": task,
                    "slice": question.row["source"],
                    "prompt_sha": question.prompt_sha,
                    "answer": given.answer,
                    "reference": question.reference,
                    "n_tokens": given.likelihood.n_tokens,
                    "nll": given.likelihood.nll,
                    "new_tokens": given.new_tokens,
                    "stops": float(given.stopped),
                    **{name: scores[name][place] if name in scores else None for name in SCORES},
                }
                for place, (question, given) in enumerate(zip(asked, answered, strict=True))
            ]
    tracking.measured |= speeds
    return sorted(predictions, key=lambda row: (row["arm"], row["id"])), limits


if __name__ == "__main__":
    stage.run("evaluate", main, Params)
