"""make serve: an OpenAI-compatible server of this machine, for chats: /v1/chat/completions, /v1/models, /health.

    python -m commands.serve                                          the best GGUF of models/export, by llama.cpp
    python -m commands.serve --gguf FILE                              another one
    python -m commands.serve --adapters a=models/adapter b=../other   models/base with adapters, by transformers and
                                                                      PEFT; the model a request names: base, a or b

The model of a GGUF file has the name of the file. Answers are greedy unless a request says otherwise. SIGTERM and
Ctrl-C let running requests finish, for at most --grace seconds, while new ones get 503.
Exit 0: stopped, all answered; 1: some were cut; 2: bad input.
"""

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from stages.lib import config, files, local_endpoint, numerics
from stages.lib.errors import DataError, PipelineError
from stages.lib.export import manifest
from stages.lib.schema.numerics import Numerics
from stages.lib.schema.runtime import Runtime
from stages.lib.serving import front

EXPORT = Path("models/export")
BASE = Path("models/base")


@dataclass
class Params:
    """How the base is held, as in training, and on how many threads."""

    numerics: Numerics
    runtime: Runtime


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = known.add_mutually_exclusive_group()
    what.add_argument("--gguf", type=Path, help="a model file; without it the one that models/export recommends")
    what.add_argument("--adapters", nargs="+", metavar="NAME=FOLDER", help="adapters of --base, each under its name")
    known.add_argument("--base", type=Path, default=BASE, help="of --adapters")
    known.add_argument("--host", default="127.0.0.1", help="anything else lets others in: there are no passwords")
    known.add_argument("--port", type=int, default=8080, help="0: a free one")
    known.add_argument("--context", type=int, default=4096, help="tokens of a prompt and its answer, at most")
    known.add_argument("--parallel", type=int, default=4, help="requests answered at once; more wait")
    known.add_argument("--grace", type=float, default=60.0, help="for requests in flight when it is stopped, seconds")
    known.add_argument("--unverified", action="store_true", help="serve a file that is not as its manifest says")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        with closing(front.listen(asked.host, asked.port)) as bound:
            cut = _adapters(asked, bound) if asked.adapters else _gguf(asked, bound)
    except (PipelineError, OSError) as fault:
        print(f"serve: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it answered anything
        return 0
    print(f"stopped, {cut} requests cut" if cut else "stopped, all requests answered", file=sys.stderr)
    return 1 if cut else 0


def _gguf(asked: argparse.Namespace, bound: socket.socket) -> int:
    from stages.lib.serving.gguf import LlamaCpp

    file = asked.gguf or recommended(EXPORT)
    if not file.is_file():
        raise DataError(f"{file}: not found, expected a GGUF file. Change --gguf.")
    if not asked.unverified:
        verify(file)
    with local_endpoint.serving(file, asked.context, asked.parallel) as address:
        engine = LlamaCpp(address, file.stem)
        _say(asked, bound, engine.names)
        return front.run(engine, bound, asked.host, grace_s=asked.grace)


def _adapters(asked: argparse.Namespace, bound: socket.socket) -> int:
    p = config.load(Params)
    os.environ["HF_HUB_OFFLINE"] = "1"
    numerics.settle(p.numerics, p.runtime.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for its developers
    from stages.lib.serving import adapters  # torch, once numerics are settled

    engine = adapters.Adapters(
        asked.base, adapters.parse(asked.adapters), p.numerics, context=asked.context, slots=asked.parallel
    )
    _say(asked, bound, engine.names)
    return front.run(engine, bound, asked.host, grace_s=asked.grace)


def _say(asked: argparse.Namespace, bound: socket.socket, names: Sequence[str]) -> None:
    if asked.host not in front.LOOPBACK:
        print(f"serve: whoever reaches {asked.host} can use it: there are no passwords.", file=sys.stderr)
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    address = f"http://{host}:{bound.getsockname()[1]}/v1"
    print(f"{address}  models: {', '.join(names)}; end with Ctrl-C", flush=True)


def recommended(folder: Path) -> Path:
    """The GGUF file that an export's manifest recommends.

    Raises: DataError, when there is no export, or no GGUF file in it.
    """
    found = manifest.read(folder)
    # q8_0 where nothing is recommended
    ggufs = sorted(
        (name for name in found["files"] if name.endswith(".gguf")), key=lambda n: ("q8_0" not in n.lower(), n)
    )
    named = found.get("recommended") or next(iter(ggufs), None)
    if named is None:
        raise DataError(f"{folder}: holds no GGUF file, expected one. Set export.formats=[gguf_q8_0], or give GGUF=...")
    return folder / named


def verify(file: Path) -> None:
    """Hold a file to the manifest of the folder it lies in, if there is one.

    Raises: DataError, when it is not as the manifest says.
    """
    folder = next((folder for folder in file.resolve().parents[:2] if (folder / manifest.NAME).is_file()), None)
    if folder is None:
        return
    recorded = manifest.read(folder)["files"].get(file.resolve().relative_to(folder).as_posix())
    found = files.sha256(file)
    if found != recorded:
        raise DataError(
            f"{file}: has sha256 {found}, expected {recorded} as {folder / manifest.NAME} says. Run quantize_export "
            "again, or add ARGS=--unverified to serve it all the same."
        )


if __name__ == "__main__":
    sys.exit(main())
