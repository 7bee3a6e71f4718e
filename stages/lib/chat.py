"""Conversations as the base model's own chat template writes them, and as token ids with labels. Needs no torch."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from stages.lib import files
from stages.lib.errors import DataError, ModelError
from stages.lib.schema.pack import Pack

IGNORED = -100
"""Label of a position that is not trained; the value torch's cross entropy leaves out."""

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Roles = np.ndarray[tuple[int], np.dtype[np.int8]]
Message = Mapping[str, Any]


class UnusableConversation(DataError):
    """A conversation that cannot be trained on as it stands; `reason` is a short code to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


ROLES = ("template", "system", "user", "assistant", "tool", "text")
"""What a token stands in: the words of a role, what the template writes around them, or a text. Encoded.roles counts here."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; three arrays of the same length T.

        <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n  yo <|im_end|> \\n
        labels  .     .  .   .     .      .      .           .       .    yo <|im_end|>  .
        roles   t     t  t   u     t      t      t           t       t    a      t       t

    input_ids: int32. labels: int32, the id, or IGNORED wherever nothing is learned. roles: int8, positions in ROLES.
    """

    input_ids: Ids
    labels: Ids
    roles: Roles


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, from its tokenizer.json alone: no remote code, no network, no torch.

    Raises: ModelError, when the folder has no tokenizer.json or no chat template.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}/tokenizer.json: not found, expected the fast tokenizer of the base model. "
            "Choose another base_model.id, or run the stage base_model again."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: has no chat template, expected chat_template.jinja. "
            "Set prompt.template to a Jinja template and run the stage base_model again."
        )
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as text, by the chat template, which may add turns of its own (a default system turn).

    Raises: UnusableConversation, with reason `template`, when the template refuses it (Gemma's: a system turn).
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as fault:
        raise UnusableConversation("template", f"the chat template refuses it: {fault}") from fault
    assert isinstance(text, str)
    return text


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of rendered text. The template has written every special token, so none is added here."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Token ids the model continues when it answers `messages`: exactly what `encode` puts before that answer."""
    return tokenize(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> Encoded:
    """Token ids of a whole conversation, labelled on each assistant answer and the token that ends its turn.

    The labelled range of a turn begins where the rendering of everything before it, with the generation prompt, ends.
    That this is a prefix of the whole, in characters and in tokens, is verified for every turn: the model is trained
    to continue exactly the tokens it will be prompted with.

    Raises: UnusableConversation, with reason `no_answer`, `control_token`, `template` or `boundary`.
    """
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise UnusableConversation("no_answer", "conversation without an assistant turn that answers something")
    if found := _control_tokens(tokenizer, messages):
        raise UnusableConversation("control_token", f"content holds the control token {found[0]!r}")
    text = render(tokenizer, messages)
    ids = tokenize(tokenizer, text)
    labels = [IGNORED] * len(ids)
    for i in answers:
        start = len(_prefix(tokenizer, render(tokenizer, messages[:i], add_generation_prompt=True), text, ids))
        turn = _prefix(tokenizer, render(tokenizer, messages[: i + 1]), text, ids)
        end = _end_of_turn(tokenizer, turn, start) + 1
        labels[start:end] = ids[start:end]
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), np.zeros(len(ids), np.int8))


def encode_all(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], settings: Pack
) -> list[Encoded | UnusableConversation]:
    """Records (records.rows) of any kind as tokens, in their order; what cannot be trained on, with its reason.

    A preference stands as its prompt and chosen turns, see `encode_pair` for both sides. No row is cut.
    """
    found: list[Encoded | UnusableConversation] = []
    for row in rows:
        try:
            found.append(encode(tokenizer, [*row["messages"], *(row["chosen"] or [])]))
        except UnusableConversation as fault:
            found.append(fault)
    return found


@dataclass(frozen=True)
class Pair:
    """A preference as token ids: input = prompt + chosen, or prompt + rejected."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def encode_pair(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], settings: Pack
) -> Pair | UnusableConversation:
    """Both sides of a preference record."""
    raise NotImplementedError


def stop_ids(tokenizer: PreTrainedTokenizerFast, model_folder: Path) -> list[int]:
    """Token ids that end an answer: the template's end of turn, and what tokenizer and generation_config.json name."""
    probe = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    found = {[label for label in probe.labels if label != IGNORED][-1]}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    path = model_folder / "generation_config.json"
    configured = files.read_json(path)["eos_token_id"] if path.is_file() else []
    return sorted(found | set(configured if isinstance(configured, list) else [configured]))


def _prefix(tokenizer: PreTrainedTokenizerFast, part: str, text: str, ids: list[int]) -> list[int]:
    """Token ids of `part`, verified to begin `text` and `ids`."""
    if not text.startswith(part):
        raise UnusableConversation("template", "the chat template writes earlier turns differently once others follow")
    found = tokenize(tokenizer, part)
    if ids[: len(found)] != found:
        raise UnusableConversation("boundary", "a token reaches across the border between a prompt and its answer")
    return found


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, turn: list[int], start: int) -> int:
    """Position of the special token that ends the assistant turn which begins at `start`."""
    special = _special(tokenizer)
    ends = [i for i in range(start, len(turn)) if turn[i] in special]
    if not ends:
        raise UnusableConversation("template", "the chat template ends an assistant turn without a special token")
    return ends[-1]


def _control_tokens(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[str]:
    return [text for text in _special(tokenizer).values() for turn in messages if text in (turn["content"] or "")]


@functools.cache
def _special(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
