"""Load compressed tensors through transformers, in the environment of llmcompressor that this runs in.

python -m stages.lib.compressed_runtime <folder> <request.json> <reply.json>   chats and prompts, answered
python -m stages.lib.compressed_runtime <folder> <file.npy>                    log-probabilities, row by row

The second reads one {"row": [...], "start": n} a line, writes its log-probabilities to the file and answers `done`.
Weights are unpacked while loading; activations are rounded at every product as vLLM's kernels round them. Imports
nothing of the project that this environment lacks packages for.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from stages.lib import fidelity, resident


def main(folder: str, request: str, reply: str) -> None:
    import torch
    from transformers import AutoTokenizer

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rendered = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in asked["chats"]
    ]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    model = load(folder)
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


def load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def answer(model: Any, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Stops where the folder's generation_config.json says."""
    import torch

    ids = torch.tensor([prompt])
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    found = written[0, len(prompt) :].tolist()
    stops = model.generation_config.eos_token_id
    return {"ids": found, "stopped": found[-1] in (stops if isinstance(stops, list) else [stops]), "top": []}


def listen(folder: str, file: str) -> None:
    import numpy as np

    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    model = load(folder)
    for line in sys.stdin:
        asked = json.loads(line)
        np.save(file, fidelity.log_probs(model, asked["row"], asked["start"]).numpy())
        print("done", file=replies, flush=True)


if __name__ == "__main__":
    (main if len(sys.argv) == 4 else listen)(*sys.argv[1:])
