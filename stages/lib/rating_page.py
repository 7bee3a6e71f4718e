"""The page a person rates answers on: two answers to one question, whose they are is not said.

One self-contained HTML file: no network, no times; equal inputs give equal bytes. What it saves, ratings.read reads.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stages.lib import page, ratings
from stages.lib.schema.evaluate import Evaluate

MOST = 300  # pairs on the page; they come in random order, so the first are a sample


def render(
    predictions: Sequence[Mapping[str, Any]],
    questions: Mapping[str, Sequence[Mapping[str, Any]]],
    p: Evaluate,
    *,
    against: str = ratings.AGAINST,
) -> str:
    """The page as HTML. Args: questions: turns of each row's prompt, by row id."""
    shown = ratings.pairs(predictions, seed=p.seed, against=against)[:MOST]
    references = {row["id"]: row["reference"] for row in predictions}
    rows = [
        {
            "id": pair.id,
            "task": pair.task,
            "key": pair.key,
            "question": [{"role": turn["role"], "text": text_of(turn)} for turn in questions[pair.id]],
            "reference": references[pair.id],
            "left": pair.left[1],
            "right": pair.right[1],
        }
        for pair in shown
    ]
    data = json.dumps({"page": ratings.page_of(shown), "pairs": rows}, ensure_ascii=False, sort_keys=True)
    return page.fill("rating_page.html.jinja", data=data.replace("<", "\\u003c"), n=len(rows))


def text_of(turn: Mapping[str, Any]) -> str:
    """What a turn says, or which tools it calls."""
    return str(turn["content"] if "content" in turn else turn["tool_calls"])
