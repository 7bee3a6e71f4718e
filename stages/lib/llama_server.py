"""Ask llama.cpp itself, in a process of its own: what it makes of a chat, and how it continues prompts.

python -m stages.lib.llama_server <file.gguf> <request.json> <reply.json>

Flash attention is off: with it, answers depend on the number of threads; without it they do not (measured to the bit).
"""

import json
import os
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.lib import resident


def main(file: str, request: str, reply: str) -> None:
    import xllamacpp

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    how = xllamacpp.CommonParams()
    how.model.path = file
    how.n_parallel = asked["slots"]
    how.n_ctx = asked["slots"] * asked["context"]
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = asked["threads"]
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    how.n_gpu_layers = 0
    how.warmup = False
    how.use_jinja = True
    how.verbosity = 0
    if asked["lora"]:
        how.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"])]
    holder = xllamacpp.Server(how)  # held until the end: without a reference it is taken down at once
    # One connection for everything: a new one for each of hundreds of chats would take most of the time.
    server = HTTPConnection(urlsplit(holder.listening_address).netloc)
    rendered = [post(server, "apply-template", {"messages": turns})["prompt"] for turns in asked["chats"]]
    tokens = [
        post(server, "tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        for text in rendered
    ]
    started = time.monotonic()
    # All prompts in one request: they are queued together, so the batches do not depend on timing.
    continued = post(
        server,
        "completion",
        {
            "prompt": asked["prompts"],
            "n_predict": asked["max_new_tokens"],
            "temperature": 0,
            "n_probs": asked["top_k"],
            "return_tokens": True,
            "cache_prompt": False,
        },
    )
    seconds = time.monotonic() - started
    answers = [
        {
            "ids": answer["tokens"],
            "stopped": answer["stop_type"] == "eos",
            "top": [
                {str(token["id"]): token["logprob"] for token in place["top_logprobs"]}
                for place in answer["completion_probabilities"]
            ],
        }
        for answer in sorted(continued if isinstance(continued, list) else [continued], key=lambda one: one["index"])
    ]
    found = {
        "rendered": rendered,
        "tokens": tokens,
        "answers": answers,
        "seconds": seconds,
        "peak_mib": resident.process_peak_mib(),
    }
    Path(reply).write_text(json.dumps(found), encoding="utf-8")


def post(server: HTTPConnection, path: str, body: dict[str, Any]) -> Any:
    server.request("POST", f"/{path}", json.dumps(body), {"Content-Type": "application/json"})
    answer = server.getresponse()
    text = answer.read().decode("utf-8", errors="replace")
    if answer.status != 200:
        raise RuntimeError(f"{path}: status {answer.status}: {text}")
    return json.loads(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the server's own way down was seen to wait for ever; everything is written
