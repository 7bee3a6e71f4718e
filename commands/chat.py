"""make chat: talk to the base and to the tuned model side by side, each with its own memory of the conversation.

    python -m commands.chat                                    starts a server of models/base and models/adapter
    python -m commands.chat --url http://.../v1 --models a b   models that a server offers, one or more
    python -m commands.chat < questions.txt                    one question a line, for scripts

/reset forgets the conversation, /quit and Ctrl-D end, Ctrl-C ends an answer: what was said of it stays said.
Exit 0: done; 1: a question was not answered (of a script); 2: no server.
The key of an endpoint comes from the environment, OPENAI_API_KEY, and is written nowhere.
"""

import argparse
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stages.lib.chat_endpoint import Endpoint
from stages.lib.errors import ExternalError, PipelineError
from stages.lib.serving import process

WIDE = 100  # columns of a terminal, from which on answers stand side by side
PROMPT = "> "


@dataclass
class Voice:
    """One of the models, and what was said between it and the user."""

    model: str
    turns: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    fault: str = ""

    def shown(self) -> Text:
        return Text(printable(self.text)).append(f"\n{self.fault}".strip("\n") if self.fault else "", style="red")


@dataclass
class Spoken:
    """One question's answers while they come in: pieces by voice, None when one is complete."""

    voices: Sequence[Voice]
    told: "queue.Queue[tuple[Voice, str | None]]" = field(default_factory=queue.Queue)
    is_over: bool = False

    def pieces(self) -> Iterator[tuple[Voice, str | None]]:
        """Until all voices are complete."""
        open_ = len(self.voices)
        while open_:
            try:
                voice, piece = self.told.get(timeout=0.1)  # with a timeout, so that Ctrl-C is heard
            except queue.Empty:
                continue
            open_ -= piece is None
            voice.text += piece or ""
            yield voice, piece


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="chat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("--url", help="base address of a running server, such as http://127.0.0.1:8080/v1")
    known.add_argument("--models", nargs="+", default=["base", "tuned"], help="their names, as the server knows them")
    known.add_argument("--adapter", type=Path, default=Path("models/adapter"), help="that `tuned` is, without --url")
    known.add_argument("--system", help="what stands before the conversation")
    known.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    known.add_argument("--temperature", type=float, default=0.0)
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as at Ctrl-D: the server is stopped, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            url = asked.url
            if url is None:
                print("loading models/base and its adapter ...", file=sys.stderr)
                url, _ = stack.enter_context(process.started(["--adapters", f"tuned={asked.adapter}"]))
            endpoint = Endpoint(url, 600.0, stack)
            return talk(endpoint, asked, Console(highlight=False))
    except (PipelineError, OSError) as fault:
        print(f"chat: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def talk(endpoint: Endpoint, asked: argparse.Namespace, console: Console) -> int:
    """Questions from standard input until it ends; the exit status."""
    voices = [Voice(model) for model in asked.models]
    is_script = not sys.stdin.isatty()
    failed = False
    while (question := _question(is_script)) is not None:
        if question == "/quit":
            break
        if question == "/reset":
            voices = [Voice(model) for model in asked.models]
        elif question.startswith("/"):
            console.print(f"{question}: no such command, expected /reset or /quit", markup=False)
        elif question:
            if is_script:
                console.print(f"{PROMPT}{printable(question)}", markup=False)
            _answer(endpoint, voices, question, asked, console)
            failed = failed or any(voice.fault for voice in voices)
    return 1 if is_script and failed else 0


def _question(is_script: bool) -> str | None:
    """The next one; None at the end. Ctrl-C takes back what was typed."""
    while True:
        try:
            return input("" if is_script else PROMPT).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", file=sys.stderr)


def _answer(
    endpoint: Endpoint, voices: Sequence[Voice], question: str, asked: argparse.Namespace, console: Console
) -> None:
    """Ask all at once, show what they say, and remember it."""
    spoken = Spoken(voices)
    for voice in voices:
        voice.text = voice.fault = ""
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        body = {
            "model": voice.model,
            "messages": [*system, *voice.turns, {"role": "user", "content": question}],
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
        }
        threading.Thread(target=_listen, args=(endpoint, voice, body, spoken), daemon=True).start()
    try:
        if console.is_terminal and console.width >= WIDE and len(voices) > 1:
            _beside(spoken, console)
        else:
            _below(spoken, console)
    except KeyboardInterrupt:
        console.print("(ended)", style="dim")
    finally:
        spoken.is_over = True
    for voice in voices:
        if voice.text:
            voice.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": voice.text}]


def _listen(endpoint: Endpoint, voice: Voice, body: dict[str, Any], spoken: Spoken) -> None:
    try:
        with closing(endpoint.stream(body)) as pieces:
            for piece in pieces:
                if spoken.is_over:  # closes the stream: the server stops writing
                    return
                spoken.told.put((voice, piece))
    except ExternalError as fault:
        if spoken.is_over:
            return
        voice.fault = str(fault)
    spoken.told.put((voice, None))


def _beside(spoken: Spoken, console: Console) -> None:
    """A column for each voice."""
    with Live(_columns(spoken.voices), console=console, refresh_per_second=12) as live:
        for _ in spoken.pieces():
            live.update(_columns(spoken.voices))
        live.vertical_overflow = "visible"  # while it grows, what is longer than the screen is cut


def _columns(voices: Sequence[Voice]) -> RenderableType:
    table = Table(expand=True, show_lines=False)
    for voice in voices:
        table.add_column(Text(voice.model), ratio=1)
    table.add_row(*(voice.shown() for voice in voices))
    return table


def _below(spoken: Spoken, console: Console) -> None:
    """One voice after the other, each as it comes in; the later ones have been writing meanwhile."""
    shown, complete = dict.fromkeys(map(id, spoken.voices), 0), set[int]()
    waiting = list(spoken.voices)
    console.print(Text(f"{waiting[0].model}: ", style="bold"), end="")
    for voice, piece in spoken.pieces():
        if piece is None:
            complete.add(id(voice))
        while waiting:
            first = waiting[0]
            console.print(Text(printable(first.text[shown[id(first)] :])), end="", soft_wrap=True)
            shown[id(first)] = len(first.text)
            if id(first) not in complete:
                break
            console.print(Text(first.fault, style="red"), soft_wrap=True)
            waiting.pop(0)
            if waiting:
                console.print(Text(f"{waiting[0].model}: ", style="bold"), end="")


def printable(text: str) -> str:
    """Without characters that would steer the terminal."""
    return "".join(one for one in text if one.isprintable() or one in "\n\t")


if __name__ == "__main__":
    sys.exit(main())
