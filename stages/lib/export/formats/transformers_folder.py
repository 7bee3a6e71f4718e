"""A Hugging Face folder: transformers is its runtime and measures it."""

import time
from abc import abstractmethod
from pathlib import Path

from transformers import PreTrainedModel

from stages.lib import chat, fidelity, generation
from stages.lib.export.formats.exporter import Answer, Exporter, Request, Session, Size, Trained

LINES = 64  # prompts in a batch: more only take memory


class TransformersFolder(Exporter):
    """What all of them share; a format writes itself and says how it is loaded."""

    runtime = measured_in = "transformers"

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def file_name(self, name: str) -> str:
        return self.folder

    def size(self, path: Path, weights: int) -> Size:
        """Scales and 16-bit embeddings included."""
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        everything = sum(file.stat().st_size for file in path.iterdir())
        return Size(round(everything / 2**20, 2), round(stored * 8 / weights, 3))

    @abstractmethod
    def load(self, path: Path, trained: Trained) -> PreTrainedModel:
        """The model in eval mode, from the folder alone."""

    def log_probs(self, path: Path, trained: Trained) -> fidelity.LogProbs:
        return fidelity.of(self.load(path, trained))

    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        tokenizer = chat.load_tokenizer(path)
        rendered = [chat.render(tokenizer, turns, add_generation_prompt=True) for turns in request.chats]
        model = self.load(path, trained)
        started = time.monotonic()
        written = generation.greedy(
            model,
            request.prompts,
            stop_ids=request.stop_ids,
            max_new_tokens=request.max_new_tokens,
            batch_size=LINES,
        )
        return Session(
            rendered,
            [chat.tokenize(tokenizer, text) for text in rendered],
            [Answer(prompt, one.ids, one.stopped, []) for prompt, one in zip(request.prompts, written, strict=True)],
            time.monotonic() - started,
        )
