"""One model, many answers at once: each in its turn gets one token, with the weights it asked for.

Each answer has keys and values of its own and is computed by itself, so that it equals, to the bit, the one it would
get alone. Batches would be faster on a GPU, and round otherwise.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import prefill
from stages.lib.serving.structured import Guide

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for a character whose last bytes are to come


@dataclass(frozen=True)
class End:
    """Why an answer ended, and what it took. reason: stop, length or failed."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class Asked:
    """An answer that is wanted. tell: called from the thread of the model with pieces of text, then with the End.

    temperature 0: the most likely token each time. seed: of what is drawn. stops: texts before which an answer ends.
    """

    weights: str
    prompt: list[int]
    max_tokens: int
    tell: Callable[[str | End], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: list[str] = field(default_factory=list)
    guide: Guide | None = None
    is_wanted: bool = True  # False once the client has gone


class Turns:
    """The thread of a model.

    Args: weights: by name, the context in which the model has them. slots: answers that are written at once; the others
        wait in the order they came.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: Collection[int],
        weights: Mapping[str, Callable[[], AbstractContextManager[Any]]],
        *,
        slots: int,
    ) -> None:
        self._model, self._tokenizer, self._stop_ids = model, tokenizer, frozenset(stop_ids)
        self._weights, self._slots = weights, slots
        self._waiting: deque[Asked] = deque()
        self._running: list[_Answer] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def ask(self, asked: Asked) -> None:
        with self._changed:
            self._waiting.append(asked)
            self._changed.notify()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End after the present token; answers that run get no end."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or not self._is_open)
                if not self._is_open:
                    return
                if self._waiting and len(self._running) < self._slots:
                    self._running.append(_Answer(self._waiting.popleft(), self._tokenizer, self._stop_ids))
            for name, weights in self._weights.items():
                if mine := [one for one in self._running if one.asked.weights == name]:
                    with torch.inference_mode(), weights():
                        for one in mine:
                            _step(one, self._model)
            self._running = [one for one in self._running if not one.is_over]


def _step(one: "_Answer", model: PreTrainedModel) -> None:
    try:
        one.step(model)
    except Exception:  # of one answer; the others go on
        traceback.print_exc()
        one.end("failed")


class _Answer:
    """An answer being written."""

    def __init__(self, asked: Asked, tokenizer: PreTrainedTokenizerFast, stop_ids: frozenset[int]) -> None:
        self.asked, self.is_over = asked, False
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._ids: list[int] = []
        self._n_told = 0  # characters
        self._read: prefill.Read | None = None
        self._generator = torch.Generator().manual_seed(asked.seed)

    def step(self, model: PreTrainedModel) -> None:
        """Read the prompt, or the token before; choose the next one."""
        if not self.asked.is_wanted:
            self.is_over = True
            return
        if self._read is None:
            room = self.asked.max_tokens
            self._read = next(prefill.in_batches(model, [self.asked.prompt], room=room, batch_size=1))
            self._positions = self._read.next_positions()
        else:
            read, last = self._read, torch.tensor([[self._ids[-1]]], device=model.device)
            read.mask = torch.cat([read.mask, read.mask.new_ones(1, 1)], dim=1)
            read.logits = read.forward(slice(None), last, read.mask, self._positions[:, None], keep=1)[:, -1]
            self._positions = self._positions + 1
        token = self._choose(self._read.logits[0])
        if token in self._stop_ids:
            self._ids.append(token)
            self.end("stop")
            return
        self._ids.append(token)
        if self.asked.guide:
            self.asked.guide.take(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        places = [place for stop in self.asked.stops if (place := text.find(stop)) >= 0]
        if places:
            self.end("stop", text[: min(places)])
        elif self.asked.guide and self.asked.guide.is_done():
            self.end("stop", text)
        elif len(self._ids) == self.asked.max_tokens:
            self.end("length", text)
        else:
            self._tell(text[: settled(text, self.asked.stops)])

    def end(self, reason: str, text: str | None = None) -> None:
        if text is None:
            written = self._ids[:-1] if self._ids and self._ids[-1] in self._stop_ids else self._ids
            text = self._tokenizer.decode(written, skip_special_tokens=True)
        self._tell(text)
        self.is_over = True
        self.asked.tell(End(reason, len(self.asked.prompt), len(self._ids)))

    def _tell(self, text: str) -> None:
        if len(text) > self._n_told:
            self.asked.tell(text[self._n_told :])
            self._n_told = len(text)

    def _choose(self, logits: torch.Tensor) -> int:
        """The next token after logits (V,)."""
        if self.asked.guide:
            allowed = self.asked.guide.allowed().to(logits.device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self.asked.temperature == 0:
            return int(logits.argmax())
        likely = torch.softmax(logits.float().cpu() / self.asked.temperature, dim=-1)
        if self.asked.top_p < 1:
            ordered, order = likely.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.asked.top_p
            likely[order[beyond]] = 0
        return int(torch.multinomial(likely, 1, generator=self._generator))


def settled(text: str, stops: Collection[str]) -> int:
    """How much of a text, in characters, later tokens cannot change or take back.

    "na\N{REPLACEMENT CHARACTER}"  ->  2        "one\\nEN" with stops ["END"]  ->  4
    """
    whole = text.rstrip(UNFINISHED)
    held = max(
        (n for stop in stops for n in range(1, min(len(stop), len(whole) + 1)) if whole.endswith(stop[:n])), default=0
    )
    return len(whole) - held
