"""What every format offers: it is written, sized, loaded again to be measured, and asked in its own runtime."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.lib.fidelity import LogProbs
from stages.lib.schema.export import Export
from stages.lib.schema.merge import Merge
from stages.lib.schema.numerics import Numerics


@dataclass(frozen=True)
class Trained:
    """The trained model as the stages left it, and all else that a format is made from.

    name: goes into file names. splits: the data, for what is calibrated on training text. scratch: for files that
    several formats are made from, on the disk they go to; gone when all are written.
    """

    name: str
    base: Path
    adapter: Path
    merged: Path
    splits: Path
    scratch: Path
    export: Export
    numerics: Numerics
    merge: Merge


@dataclass(frozen=True)
class Size:
    """What the format takes on disk. fallback_tensors: matrices that could not be held as the format says."""

    mib: float
    bits_per_weight: float
    fallback_tensors: int = 0


@dataclass(frozen=True)
class Request:
    """What a runtime is asked: to write chats as text and tokens, and to continue prompts (token ids) greedily."""

    chats: Sequence[Sequence[Mapping[str, str]]]
    prompts: Sequence[Sequence[int]]
    stop_ids: Collection[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """One greedy answer, without its stop token.

    top: for each generated token, the runtime's most likely tokens, id -> log-probability; empty where it tells none.
    """

    prompt: Sequence[int]
    ids: list[int]
    stopped: bool
    top: list[dict[int, float]]


@dataclass(frozen=True)
class Session:
    """What a runtime replied. rendered, tokens: each chat with the opening of its answer. seconds: for all answers.

    peak_mib: the most memory of the process that answered; None where it is this one.
    """

    rendered: list[str]
    tokens: list[list[int]]
    answers: list[Answer]
    seconds: float
    peak_mib: float | None = None


class Exporter(ABC):
    """One format. runtime: what it is made for, as tables name it. measured_in: where log-probabilities come from."""

    runtime: str
    measured_in: str

    def absent(self) -> str | None:
        """Why this machine cannot write the format (an extra that is not installed), with what to type; else None."""
        return None

    @abstractmethod
    def file_name(self, name: str) -> str:
        """Name of the file or folder in models/export, for a model called `name`."""

    @abstractmethod
    def write(self, trained: Trained, path: Path) -> None:
        """Write the format to `path`.

        Raises: ExternalError, when a converter is missing or stops; ModelError, when it does not know the model.
        """

    @abstractmethod
    def size(self, path: Path, weights: int) -> Size:
        """What was written. Args: weights: parameters of the merged model."""

    @abstractmethod
    def log_probs(self, path: Path, trained: Trained) -> LogProbs:
        """The model, loaded again from what was written; it leaves memory with the returned function.

        Raises: ModelError, when the files are not a whole model.
        """

    @abstractmethod
    def ask(self, path: Path, request: Request, trained: Trained) -> Session:
        """Chats and answers in the runtime the format is made for.

        Raises: ExternalError, when the runtime does not load the file, crashes or answers otherwise than asked.
        """
