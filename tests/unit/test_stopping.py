"""A model that learned short answers by heart ends its turns by itself, and answers alike in batches of any size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.lib import adapters, arms, chat, models, numerics, packing, records, training
from stages.lib.schema.lora import Method
from stages.lib.schema.numerics import Quantization
from tests.tiny_training import LORA, NF4, TRAIN

PLAIN = replace(NF4, quantization=Quantization.none)
WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog")


@pytest.mark.slow  # trained for seconds
def test_an_overfitted_model_stops_by_itself_and_its_scores_survive_the_batch_size(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    rows = [
        records.make(
            [{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": f"add {answer} dog"}],
            group=word,
            source="tests",
            task="add",
        )
        for answer, word in enumerate(WORDS)
    ]
    tokens = packing.Tokens.of([(row["id"], chat.encode(tokenizer, row["messages"])) for row in rows])
    packs = [pack for table in packing.packs(tokens, max_tokens=256) for pack in packing.packs_of(table)]
    numerics.seed_everything(0, PLAIN)
    model = adapters.add_adapter(
        models.load_base(tiny_model_dir, PLAIN), replace(LORA, method=Method.full, dropout=0.0)
    )
    stop_ids = chat.stop_ids(tokenizer, tiny_model_dir)
    training.train(
        model,
        packs,
        packs,
        replace(TRAIN, epochs=60.0, learning_rate=2.0e-3, evals_per_epoch=1),
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        resolved=numerics.resolve(PLAIN),
        seed=0,
    )
    model.eval()
    asked = arms.questions(tokenizer, rows)

    def answered(batch_size: int) -> list[Any]:
        return arms.answer(
            model,
            tokenizer,
            asked,
            stop_ids=stop_ids,
            max_new_tokens=20,
            batch_size=batch_size,
            speed=arms.Speed(),
        )

    alone, together = answered(1), answered(8)
    assert sum(each.stopped is True for each in together) >= 0.95 * len(rows)
    assert {each.answer for each in together} <= {question.reference for question in asked}
    assert [(each.answer, each.stopped) for each in alone] == [(each.answer, each.stopped) for each in together]
    likelihoods = [[each.likelihood.nll for each in found] for found in (alone, together)]
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-4, abs=1e-6)
