"""Ask llama.cpp itself, in a process of its own: what it makes of a chat, and how it continues prompts.

python -m stages.lib.llama_server <file.gguf> <request.json> <reply.json>

Flash attention is off: with it, answers depend on the number of threads; without it they do not (measured to the bit).
"""

import json
import os
import resource
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


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
    server = xllamacpp.Server(how)  # held until the end: without a reference it is taken down at once
    address = server.listening_address
    rendered = [post(address, "apply-template", {"messages": turns})["prompt"] for turns in asked["chats"]]
    tokens = [
        post(address, "tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        for text in rendered
    ]
    started = time.monotonic()
    # All prompts in one request: they are queued together, so the batches do not depend on timing.
    continued = post(
        address,
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
            "stop": answer["stop_type"],
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
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(reply).write_text(json.dumps(found), encoding="utf-8")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(
        f"{address}/{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy: it is this process
    with opener.open(asked) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the server's own way down was seen to wait for ever; everything is written
