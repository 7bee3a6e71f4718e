"""make lm-eval: let EleutherAI's lm-eval score the tuned model on the test split, beside the figures of evaluate.

    python -m commands.lm_eval [numerics.device=cpu ...]

Both define one thing alike: the negative log-likelihood of a row's reference after its prompt. Weights, tokens and
that definition are the same; batching, positions and summation are lm-eval's own. Its task: data/lm_eval/answers.yaml.
Exit status: 0 they agree, 1 they do not, 2 there is nothing to compare.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.lib import chat, config, files, numerics, records
from stages.lib.errors import PipelineError
from stages.lib.schema.evaluate import Evaluate
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.runtime import Runtime

TASKS = Path("data/lm_eval")
ROWS = Path("runs/lm_eval/answers.jsonl")
PREDICTIONS = Path("reports/evaluation/predictions.parquet")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far, in nats per token of a row, the two may lie apart: other batches and another order of sums."""


@dataclass
class Params:
    evaluate: Evaluate
    numerics: Numerics
    runtime: Runtime


@dataclass(frozen=True)
class Compared:
    """One task: figures of evaluate and of lm-eval on the same rows."""

    rows: int
    loss: tuple[float, float]  # nats per token of the references
    exact: tuple[float, float]  # share of answers that are the reference
    farthest: float  # of all rows, nats per token


def main() -> int:
    if importlib.util.find_spec("lm_eval") is None:
        return _refused("lm-eval is not installed. Type .venv/bin/uv pip install -c requirements.lock lm-eval")
    if not PREDICTIONS.exists():
        return _refused(f"{PREDICTIONS}: not found. Run the stage evaluate first: make repro")
    try:
        p = config.load(Params, sys.argv[1:])
        # offline, before the libraries read it
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((ROWS.parent / "cache").resolve())}
        numerics.settle(p.numerics, p.runtime.threads)
        tuned = [row for row in pq.read_table(PREDICTIONS).to_pylist() if row["arm"] == "tuned"]
        found = scores(p, tuned)
    except PipelineError as fault:
        return _refused(str(fault))
    tolerance = TOLERANCE[numerics.resolve(p.numerics).compute_dtype]
    if left_out := len(tuned) - len(found):
        print(f"lm-eval: {left_out} rows left out: their text does not give their tokens back")
    agrees = True
    for task, line in compared(tuned, found).items():
        agrees &= line.farthest <= tolerance
        print(
            f"{task}, {line.rows} rows:\n"
            f"  loss, nats per token   evaluate {line.loss[0]:.6f}   lm-eval {line.loss[1]:.6f}\n"
            f"  answer is reference    evaluate {line.exact[0]:.4f}     lm-eval {line.exact[1]:.4f}, as tokens\n"
            f"  farthest row           {line.farthest:.1e} nats per token apart, {tolerance:.0e} allowed"
        )
    return 0 if agrees else 1


def _refused(reason: str) -> int:
    print(f"lm-eval: {reason}", file=sys.stderr)
    return 2


def scores(p: Params, tuned: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, bool]]:
    """By row: lm-eval's negative log-likelihood of the reference, nats, and whether it is the likeliest answer."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from stages.lib import models

    class Harness(HFLM):  # type: ignore[misc]  # lm-eval is not followed
        """lm-eval's model, the answer beginning where the prompt ends.

        lm-eval moves white space from the end of a prompt to the answer; a chat template's prompt ends with a line
        break, which the model does not have to answer.
        """

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            prompt = self.tok_encode(context, add_special_tokens=False)
            whole = self.tok_encode(context + continuation, add_special_tokens=False)
            return prompt, whole[len(prompt) :]

    base = Path("models/base")
    tokenizer = chat.load_tokenizer(base)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(ROWS, as_text(tokenizer, {row["id"] for row in tuned}))
    resolved = numerics.resolve(p.numerics)
    model = models.load_tuned(base, Path("models/adapter"), p.numerics, dense=resolved.device == "cpu")
    done = simple_evaluate(
        model=Harness(pretrained=model, tokenizer=tokenizer, batch_size=min(p.evaluate.batch_size, 16)),
        tasks=["answers"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        sample["doc"]["id"]: (-sample["filtered_resps"][0][0], bool(sample["filtered_resps"][0][1]))
        for sample in done["samples"]["answers"]
    }


def as_text(tokenizer: Any, wanted: set[str]) -> list[dict[str, str]]:
    """Prompt and answer of the wanted test rows as text, where encoding it gives the very tokens evaluate used."""
    from stages.lib import arms

    rows = sorted(
        (row for row in records.read(Path("data/splits/test.parquet")) if row["id"] in wanted),
        key=lambda row: str(row["id"]),
    )
    found = []
    for question in arms.questions(tokenizer, rows):
        prompt, answer = (tokenizer.decode(ids) for ids in (question.prompt, question.answer))
        tokens = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, prompt + answer)]
        if tokens == [question.prompt, question.prompt + question.answer]:
            found.append({"id": question.row["id"], "prompt": prompt, "answer": answer})
    return found


def compared(tuned: Sequence[Mapping[str, Any]], found: Mapping[str, tuple[float, bool]]) -> dict[str, Compared]:
    """Both harnesses' figures by task, over the rows that both scored."""
    lines = {}
    for task in sorted({row["task"] for row in tuned}):
        rows = [row for row in tuned if row["task"] == task and row["id"] in found]
        if not rows:
            continue
        nll = [found[row["id"]][0] for row in rows]
        n_tokens = sum(row["n_tokens"] for row in rows)
        lines[task] = Compared(
            rows=len(rows),
            loss=(sum(row["nll"] for row in rows) / n_tokens, sum(nll) / n_tokens),
            exact=(
                sum(row["answer"].strip() == row["reference"].strip() for row in rows) / len(rows),
                sum(found[row["id"]][1] for row in rows) / len(rows),
            ),
            farthest=max(abs(row["nll"] - value) / row["n_tokens"] for row, value in zip(rows, nll, strict=True)),
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
