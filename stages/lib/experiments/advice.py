"""Prompt, retrieve or fine-tune: what the data and the untrained base's scores say of each task.

what the base answers     how many good rows    whether answers change      what was measured after training
         |                        |                      |                               |
         +---- the first rule that applies decides; the others are said as reasons ------+
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

Metrics = Mapping[str, float]

ENOUGH = 0.9
"""Score of the base, with or without examples, from which nothing has to be learned."""

FEW, MANY = 50, 500
"""Good rows of a task: below the one only prompting is worth it; from the other on format and style are learned."""

MEASURES = ("accuracy", "field_f1", "rouge_l", "token_f1")
"""What tells how good answers of a task are: the first that it has."""

OF_FORMAT = ("json_valid", "json_schema", "stops")
"""What tells whether answers have the wanted form, whatever they say."""


@dataclass(frozen=True)
class Task:
    """What is known of one task.

    rows: good ones for training, as they are split; available: about how many would be, were they not capped.
    measure: of the scores, None where the base was not asked; gain: tuned less the base with examples, (low, high).
    form: by measure of form, of the base with examples.
    """

    name: str
    rows: int
    available: int
    measure: str | None = None
    base: float | None = None
    fewshot: float | None = None
    tuned: float | None = None
    gain: tuple[float, float] | None = None
    form: dict[str, float] = field(default_factory=dict)
    changes: bool = False


@dataclass(frozen=True)
class Advice:
    """do: prompt, retrieve or fine-tune. reasons: the one that decided first."""

    task: str
    do: str
    reasons: list[str]


def tasks(prepared: Metrics, split: Metrics, evaluated: Metrics, *, changing: Collection[str] = ()) -> list[Task]:
    """The tasks of the training split, from the metrics of prepare, dedup_split and evaluate (which may be empty).

    Args: changing: tasks whose right answers change while the model is in use.
    """
    names = [key.removeprefix("rows/train/") for key in split if key.startswith("rows/train/")]
    repeated = sum(split[f"duplicates/{kind}"] for kind in ("exact", "near", "semantic"))
    kept = (1 - repeated / split["rows/in"]) * split["split/share/train"] if split["rows/in"] else 0.0
    return [
        _with_scores(
            Task(
                name,
                int(split[f"rows/train/{name}"]),
                max(int(split[f"rows/train/{name}"]), int(kept * prepared.get(f"rows/out/{name}", 0))),
                changes=name in changing,
            ),
            evaluated,
        )
        for name in sorted(names)
    ]


def _with_scores(task: Task, evaluated: Metrics) -> Task:
    def of(measure: str, what: str) -> float | None:
        return evaluated.get(f"test/{task.name}/{measure}/{what}")

    measure = next((name for name in MEASURES if of(name, "base") is not None), None)
    if measure is None:
        return task
    low, high = of(measure, "low_fewshot"), of(measure, "high_fewshot")
    form = {name: score for name in OF_FORMAT if (score := of(name, "fewshot")) is not None}
    return replace(
        task,
        measure=measure,
        base=of(measure, "base"),
        fewshot=of(measure, "fewshot"),
        tuned=of(measure, "tuned"),
        gain=None if low is None or high is None else (low, high),
        form=form,
    )


def advise(task: Task) -> Advice:
    """The first rule that applies.

    answers change                    retrieve: training would fix them as they are today
    base scores ENOUGH                prompt
    base with examples scores ENOUGH  prompt, with examples
    fewer than FEW good rows          prompt: they are worth more as examples, and as a test
    measured: tuned beats examples    fine-tune
    measured: tuned is worse          prompt
    MANY good rows                    fine-tune: format and style are learned from so many
    otherwise                         prompt, until there are more rows

    What was measured and tells neither is said as a reason.
    """
    rows = f"{task.rows} good rows to train on"
    scores = _scores(task)
    if task.changes:
        return Advice(task.name, "retrieve", ["its answers change: training would fix them as they are today", *scores])
    if task.base is not None and task.base >= ENOUGH:
        return Advice(task.name, "prompt", [f"it scores {task.base:.2f} as it is, {ENOUGH} is enough", rows])
    if task.fewshot is not None and task.fewshot >= ENOUGH:
        return Advice(task.name, "prompt", [f"with examples it scores {task.fewshot:.2f}, {ENOUGH} is enough", rows])
    if task.rows < FEW:
        return Advice(task.name, "prompt", [f"{rows}, fewer than {FEW}", *_more(task, FEW), *scores])
    if task.gain is not None:
        low, high = task.gain
        said = f"measured: tuned less the base with examples {low:+.2f} to {high:+.2f} {task.measure}"
        if low > 0:
            return Advice(task.name, "fine-tune", [said, rows, *scores])
        if high < 0:
            return Advice(task.name, "prompt", [said, rows, *scores])
        scores = [f"{said}: no gain shown", *scores]
    if task.rows >= MANY:
        return Advice(task.name, "fine-tune", [f"{rows}, {MANY} teach format and style", *scores])
    return Advice(task.name, "prompt", [f"{rows}, {MANY} are wanted to fine-tune", *_more(task, MANY), *scores])


def _scores(task: Task) -> list[str]:
    if task.measure is None:
        return ["the base was not asked: `dvc repro evaluate` scores it, with and without examples"]
    shown = {"base": task.base, "with examples": task.fewshot, "tuned": task.tuned}
    said = ", ".join(f"{name} {score:.2f}" for name, score in shown.items() if score is not None)
    weak = [f"{name} {score:.2f}" for name, score in task.form.items() if score < ENOUGH]
    form = f"; with examples the form is not kept ({', '.join(weak)}), which training teaches" if weak else ""
    return [f"{task.measure}: {said}{form}"]


def _more(task: Task, wanted: int) -> list[str]:
    if task.available <= task.rows:
        return []
    enough = "enough" if task.available >= wanted else f"short of {wanted}"
    return [f"about {task.available:,} valid rows are there, {enough}: lift split.max_rows"]
