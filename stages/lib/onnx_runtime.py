"""Ask ONNX Runtime GenAI itself, in a process of its own: what it makes of a chat, and how it continues prompts.

python -m stages.lib.onnx_runtime <folder> <request.json> <reply.json>

It stops where genai_config.json says, not where it is told to: a wrong stop id there shows as answers without an end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from stages.lib import resident

TOP_K = 10


def main(folder: str, request: str, reply: str) -> None:
    import onnxruntime_genai as og

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    model = load(folder, asked["threads"])
    tokenizer = og.Tokenizer(model)
    rendered = [
        tokenizer.apply_chat_template(json.dumps(turns, ensure_ascii=False), add_generation_prompt=True)
        for turns in asked["chats"]
    ]
    tokens = [[int(token) for token in tokenizer.encode(text)] for text in rendered]
    started = time.monotonic()
    answers = [answer(model, prompt, asked["max_new_tokens"]) for prompt in asked["prompts"]]
    found = {
        "rendered": rendered,
        "tokens": tokens,
        "answers": answers,
        "seconds": time.monotonic() - started,
        "peak_mib": resident.process_peak_mib(),
    }
    Path(reply).write_text(json.dumps(found), encoding="utf-8")


def load(folder: str, threads: int) -> Any:
    """The model, on the CPU, with a number of threads instead of one a core."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return og.Model(config)


def begin(model: Any, prompt: list[int], max_length: int) -> Any:
    """A greedy generator that has read the prompt."""
    import numpy as np
    import onnxruntime_genai as og

    how = og.GeneratorParams(model)
    how.set_search_options(do_sample=False, num_beams=1, batch_size=1, max_length=max_length)
    generator = og.Generator(model, how)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    return generator


def answer(model: Any, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
    ids: list[int] = []
    top: list[dict[int, float]] = []
    generator = begin(model, prompt, len(prompt) + max_new_tokens + 1)  # one more: its own limit is never what ends it
    while len(ids) < max_new_tokens and not generator.is_done():
        top.append(most_likely(generator.get_logits()[0, -1]))
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return {"ids": ids, "stopped": bool(generator.is_done()), "top": top}


def most_likely(logits: Any) -> dict[int, float]:
    """Args: logits: (V,), a NumPy array."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    log_probs = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-log_probs, kind="stable")[:TOP_K]
    return {int(token): float(log_probs[token]) for token in best}


if __name__ == "__main__":
    main(*sys.argv[1:])
