"""What training made of the rest of the language: how likely base and tuned model find general text.

A model that learns a task may forget others. Prose that no task is about shows it: its perplexity before and after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import comparison, untrained
from stages.lib.comparison import Line
from stages.lib.errors import DataError
from stages.lib.schema.evaluate import Evaluate, GeneralText

TASK = "general"
AT_ONCE = 4  # windows in a pass: logits of 4 x 256 tokens over a vocabulary of 49,152 are 200 MB


@dataclass(frozen=True)
class Window:
    """A run of tokens of one file: all but the first are predicted, from those before them in the window."""

    name: str
    ids: list[int]
    n_bytes: int  # of the predicted tokens, UTF-8


def compare(model: PeftModel, tokenizer: PreTrainedTokenizerFast, p: Evaluate, store: Path | None = None) -> list[Line]:
    """Perplexity and bits per byte of the base and the tuned model on evaluate.general_text; none where it is off.

    The interval is a bootstrap over windows.

    Args: store: where the base's likelihoods are kept, see untrained.
    """
    read = windows(tokenizer, texts(p.general_text), p.general_text)
    if not read:
        return []
    with model.disable_adapter():
        nll = {"base": untrained.once(store, TASK, lambda: likelihoods(model, read))}
    nll["tuned"] = likelihoods(model, read)
    predictions = [
        {
            "arm": arm,
            "id": window.name,
            "task": TASK,
            "nll": found,
            "n_tokens": len(window.ids) - 1,
            "n_bytes": window.n_bytes,
        }
        for arm in ("base", "tuned")
        for window, found in zip(read, nll[arm], strict=True)
    ]
    return comparison.compare(predictions, p, measures=("perplexity", "bits_per_byte"))


def texts(p: GeneralText) -> dict[str, str]:
    """The text of each file, by its name; the package is pinned by the lock file, its text by that.

    Raises: DataError, when the package is not installed or has no such file.
    """
    if p.package is None:
        return {}
    try:
        held = metadata.distribution(p.package)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"evaluate.general_text.package: {p.package!r} is not installed, expected a package of requirements.lock, "
            "or null."
        ) from None
    found = sorted(str(file) for file in held.files or [] if PurePosixPath(file).match(p.files))
    if not found:
        raise DataError(
            f"evaluate.general_text.files: no file of {p.package} matches {p.files!r}, expected text files such as "
            "sklearn/datasets/descr/*.rst of scikit-learn."
        )
    return {name: Path(str(held.locate_file(name))).read_text(encoding="utf-8") for name in found}


def windows(tokenizer: PreTrainedTokenizerFast, found: dict[str, str], p: GeneralText) -> list[Window]:
    """Whole windows of p.window tokens, the first of each text, then the second of each, until p.tokens are reached.

    texts a a a b, window 1, tokens 3  ->  a b a
    """
    turns = []
    for name, text in sorted(found.items()):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        for start in range(0, len(ids) - p.window + 1, p.window):
            last = start + p.window - 1
            n_bytes = len(text[ends[start] : ends[last]].encode())
            turns.append((start, name, Window(f"{name}:{start:06}", ids[start : last + 1], n_bytes)))
    return [window for *_, window in sorted(turns, key=lambda turn: turn[:2])][: p.tokens // p.window]


@torch.inference_mode()
def likelihoods(model: PreTrainedModel, read: Sequence[Window]) -> list[float]:
    """Negative log-likelihood of each window's predicted tokens, summed, in nats. Windows are equally long."""
    found = []
    for start in range(0, len(read), AT_ONCE):
        ids = torch.tensor([window.ids for window in read[start : start + AT_ONCE]], device=model.device)  # (b, T)
        logits = model(input_ids=ids, use_cache=False).logits[
            :, -ids.shape[1] : -1
        ]  # (b, T - 1, V); virtual tokens apart
        expected = ids[:, 1:].flatten()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), expected, reduction="none")
        found += nll.view(len(ids), -1).double().sum(dim=1).tolist()
    return found


def metrics(lines: Sequence[Line]) -> dict[str, float]:
    """`general/<measure>/{base,tuned,delta,low,high}`."""
    return {name.removeprefix("test/"): value for name, value in comparison.metrics(lines).items()}
