"""Rows as the base model's own chat template writes them, and as token ids with labels. Needs no torch.

A row is rendered once, and once more up to each answer; all rows of a batch are tokenized together. Where an answer
begins and ends among the tokens follows from the added tokens, at which a tokenizer cuts text before anything else:

    text    <|im_start|> user\\n hi <|im_end|> \\n <|im_start|> assistant\\n | yo <|im_end|> \\n
    prefix  ................................................ head | tail    so its ids are those of the whole up to the
                                                                          last added token, and those of a short tail
"""

import functools
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template  # the public way copies every row first

from stages.lib import files
from stages.lib.errors import DataError, ModelError
from stages.lib.schema.pack import ControlTokens, Labels, Pack

IGNORED = -100
"""Label of a position that is not trained; the value torch's cross entropy leaves out."""

ROLES = ("template", "system", "user", "assistant", "tool", "text")
"""What a token stands in: the words of a role, what the template writes around them, or a text."""

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Roles = np.ndarray[tuple[int], np.dtype[np.int8]]
Message = Mapping[str, Any]

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TODAY = date(2024, 7, 26)  # for templates that ask (Llama 3.1); this is the date theirs writes where it cannot ask
OPEN, CLOSE, STAND_IN = "\U0010fffc", "\U0010fffd", "\U0010fffe"
"""Around a control token inside a content while the template renders it; around the number of one of the template's."""
ASSISTANT = ROLES.index("assistant")
THINK, THOUGHT = "<think>", "</think>"
PARTING = re.compile(r"split\(['\"]</think>['\"]\)")
PROBE = ({"role": "user", "content": "probe question"}, {"role": "assistant", "content": "probe answer"})
LONGEST_TAIL = 256  # characters; longer ones are the user's words and do not come back


class UnusableConversation(DataError):
    """A row that cannot be trained on as it stands; `reason` is a short code to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; three arrays of the same length T.

        <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n  yo <|im_end|> \\n
        labels  .     .  .   .     .      .      .           .       .    yo <|im_end|>  .
        roles   t     t  t   u     t      t      t           t       t    a      a       t

    input_ids: int32. labels: int32, the id, or IGNORED wherever nothing is learned; the first is never learned, since
    nothing precedes it. roles: int8, positions in ROLES; the token that ends a trained answer is the assistant's.
    """

    input_ids: Ids
    labels: Ids
    roles: Roles


@dataclass(frozen=True)
class Pair:
    """A preference as token ids; chosen and rejected each continue prompt, and end with the end of turn."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


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
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, by the chat template, which may add turns of its own (a default system turn).

    Raises: UnusableConversation, with reason `template`, when the template refuses it (Gemma's: a system turn).
    """
    writer = _writer(tokenizer, tools)
    return writer.render(writer.turns(messages), tools, add_generation_prompt)


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of rendered text. The template has written every special token, so none is added here."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[int]:
    """Token ids the model continues when it answers `messages`: exactly what `encode` puts before that answer.

    What looks like a control token in a content is encoded as ordinary text.
    Raises: UnusableConversation, with reason `template` or `control_token`.
    """
    writer = _writer(tokenizer, tools)
    turns = writer.turns(messages)
    if not writer.holds_control(turns, tools):
        return writer.ids([writer.render(turns, tools, True)])[0]
    return writer.plain.ids(writer.plain.swap(writer.render(*writer.marked(turns, tools), True)))


def encode(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    labels: Labels = Labels.assistant_only,
    control_tokens: ControlTokens = ControlTokens.text,
) -> Encoded:
    """Token ids of one conversation, labelled on the answers that `labels` names and the tokens that end their turns.

    Raises: UnusableConversation, see `encode_all`.
    """
    writer = _writer(tokenizer, tools)
    (found,) = _finished(writer, [_attempt(_chat, writer, messages, tools, labels, control_tokens)])
    if isinstance(found, UnusableConversation):
        raise found
    return found


def encode_text(
    tokenizer: PreTrainedTokenizerFast, text: str, *, control_tokens: ControlTokens = ControlTokens.text
) -> Encoded:
    """Token ids of a plain text, all of it labelled but the first token.

    Raises: UnusableConversation, with reason `control_token` or `no_end_token`.
    """
    writer = _writer(tokenizer, None)
    (found,) = _finished(writer, [_attempt(_text, writer, text, control_tokens)])
    if isinstance(found, UnusableConversation):
        raise found
    return found


def encode_all(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], settings: Pack
) -> list[Encoded | UnusableConversation]:
    """Records (records.rows) of any kind as tokens, in their order; what cannot be trained on, with its reason.

    A preference stands as its prompt and chosen turns (`encode_pair` has both sides). No row is cut.

    Labels: where the template marks answers by {% generation %}, these; else the labelled range of a turn begins where
    the rendering of all before it, with the generation prompt, ends. That this is a prefix of the whole, in characters
    and in tokens, is verified for every answer: the model is trained to continue the very tokens it is prompted with.
    The token that ends the turn is labelled in any case. A text has the tokenizer's BOS first, if it sets one, and eos.

    Returns reasons: no_answer, control_token, template (refuses the row, or writes earlier turns differently later),
        boundary (a token reaches across the border of prompt and answer), tools_not_rendered, unwanted, no_end_token.
    """
    writers = (_writer(tokenizer, None), _writer(tokenizer, [{}]))  # a model may have a template of its own for tools
    drafts = [_attempt(_drafted, writers[bool(row["tools"])], row, settings) for row in rows]
    if writers[0] is writers[1]:
        return _finished(writers[0], drafts)
    found: dict[int, Encoded | UnusableConversation] = {}
    for has_tools, writer in zip((False, True), writers, strict=True):
        places = [k for k, row in enumerate(rows) if bool(row["tools"]) is has_tools]
        found.update(zip(places, _finished(writer, [drafts[k] for k in places]), strict=True))
    return [found[k] for k in range(len(rows))]


def encode_pair(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], settings: Pack
) -> Pair | UnusableConversation:
    """Both sides of a preference record; reasons as in `encode_all`."""
    try:
        prompt = prompt_ids(tokenizer, row["messages"], row["tools"])
        sides = []
        for side in (row["chosen"], row["rejected"]):
            turns = [*row["messages"], *side]
            whole = encode(
                tokenizer, turns, row["tools"], labels=Labels.last_turn, control_tokens=settings.control_tokens
            )
            if whole.input_ids[: len(prompt)].tolist() != prompt:
                raise _boundary()
            end = int(np.flatnonzero(whole.labels != IGNORED)[-1]) + 1
            sides.append(whole.input_ids[len(prompt) : end])
    except UnusableConversation as fault:
        return fault
    return Pair(np.array(prompt, np.int32), *sides)


def stop_ids(tokenizer: PreTrainedTokenizerFast, model_folder: Path) -> list[int]:
    """Token ids that end an answer: the template's end of turn, and what tokenizer and generation_config.json name."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    probe = encode(tokenizer, turns, labels=Labels.last_turn)
    found = {int(probe.labels[probe.labels != IGNORED][-1])}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    path = model_folder / "generation_config.json"
    configured = files.read_json(path)["eos_token_id"] if path.is_file() else []
    return sorted(found | set(configured if isinstance(configured, list) else [configured]))


@dataclass(frozen=True)
class _Draft:
    """A row before its tokens are known; all places count characters of `text`.

    answers: (begin, end) of what is trained, the end of turn within it or right behind. words: (begin, end, role).
    """

    text: str
    answers: list[tuple[int, int]]
    words: list[tuple[int, int, int]]
    is_escaped: bool = False  # text is one for the plain tokenizer
    is_text: bool = False
    is_learned_whole: bool = False


_Tried = _Draft | UnusableConversation
Made = TypeVar("Made")


def _attempt(make: Callable[..., Made], *arguments: Any) -> Made | UnusableConversation:
    try:
        return make(*arguments)
    except UnusableConversation as fault:
        return fault


def _drafted(writer: "_Writer", row: Mapping[str, Any], settings: Pack) -> _Draft:
    if row["kind"] == "text":
        return _text(writer, row["text"], settings.control_tokens)
    if row["kind"] == "unpaired" and row["label"] == "false":
        raise UnusableConversation("unwanted", "an answer that is not wanted is not learned")
    turns = [*row["messages"], *row["chosen"]] if row["chosen"] else row["messages"]
    return _chat(writer, turns, row["tools"], settings.labels, settings.control_tokens)


def _text(writer: "_Writer", text: str, control_tokens: ControlTokens) -> _Draft:
    if writer.eos is None:
        raise UnusableConversation("no_end_token", "the tokenizer has no eos token to end a text with")
    is_escaped = writer.pattern.search(text) is not None
    if is_escaped and (control_tokens is ControlTokens.drop or STAND_IN in text):
        raise _control(writer, text)
    return _Draft(text, [], [], is_escaped=is_escaped, is_text=True, is_learned_whole=True)


def _chat(
    writer: "_Writer",
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    labels: Labels,
    control_tokens: ControlTokens,
) -> _Draft:
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0 or (labels is Labels.last_turn and answers[-1] != len(messages) - 1):
        raise UnusableConversation("no_answer", "conversation without an assistant turn that answers something")
    names = _check_tools(writer, messages, tools)
    given = writer.turns(messages)
    turns: Sequence[Message] = given
    shown = _same
    if is_escaped := writer.holds_control(turns, tools):
        if control_tokens is ControlTokens.drop:
            raise _control(writer, json.dumps([turns, tools], ensure_ascii=False))
        turns, tools = writer.marked(turns, tools)
        shown = writer.plain.swap
    wanted = answers[-1:] if labels is Labels.last_turn else answers
    if labels is Labels.all:
        text, spans = shown(writer.render(turns, tools)), list[tuple[int, int]]()
    else:
        text, spans = _answers(writer, turns, tools, answers, wanted, shown)
    if absent := [name for name in names if name not in text]:
        raise _not_rendered(writer, f"the tool {absent[0]!r}")
    trained = dict(zip(wanted, spans, strict=False))
    words = writer.words(text, given, trained)
    return _Draft(text, spans, words, is_escaped=is_escaped, is_learned_whole=labels is Labels.all)


def _answers(
    writer: "_Writer",
    turns: Sequence[Message],
    tools: Sequence[Any] | None,
    answers: Sequence[int],
    wanted: Sequence[int],
    shown: Callable[[str], str],
) -> tuple[str, list[tuple[int, int]]]:
    """The text to tokenize, and in it the places of the wanted answers."""
    if writer.marks_answers:
        text, spans = writer.render_marked(turns, tools)
        written = [text[begin:end] for begin, end in spans]
        if len(spans) == len(answers) and all(
            _content(turns[i]).strip() in part for i, part in zip(answers, written, strict=True)
        ):
            places = [(len(shown(text[:begin])), len(shown(text[:end]))) for begin, end in spans[-len(wanted) :]]
            return shown(text), places
    text = shown(writer.render(turns, tools))
    places = []
    for i in wanted:
        prompt = shown(writer.render(turns[:i], tools, True))
        turn = text if i == len(turns) - 1 else shown(writer.render(turns[: i + 1], tools))
        if not (text.startswith(prompt) and text.startswith(turn)):
            raise UnusableConversation(
                "template",
                f"the chat template of {writer.name} writes earlier turns differently once others follow: "
                "set pack.labels=last_turn, or use a template that marks answers by {% generation %}",
            )
        places.append((len(prompt), len(turn)))
    return text, places


def _check_tools(writer: "_Writer", turns: Sequence[Message], tools: Sequence[Any] | None) -> list[str]:
    """Names of the tools and of those called, which must stand in the text."""
    called = [call for turn in turns for call in turn.get("tool_calls") or ()]
    if tools and not writer.writes_tools:
        raise _not_rendered(writer, "tools")
    if called and not writer.writes_calls:
        raise _not_rendered(writer, "tool calls")
    return [_function_name(each) for each in [*(tools or ()), *called]]


def _finished(writer: "_Writer", drafts: Sequence[_Tried]) -> list[Encoded | UnusableConversation]:
    """Tokenize all drafts at once, and find their places among the tokens."""
    usable = [draft for draft in drafts if isinstance(draft, _Draft)]
    quick = iter(writer.ids([draft.text for draft in usable if not draft.is_escaped]))
    rows = [_attempt(writer.plain.ids, draft.text) if draft.is_escaped else next(quick) for draft in usable]
    rows = [
        [*writer.begins, *ids, writer.eos] if draft.is_text and isinstance(ids, list) else ids
        for draft, ids in zip(usable, rows, strict=True)
    ]
    bounds = [0, *itertools.accumulate(len(ids) if isinstance(ids, list) else 0 for ids in rows)]
    flat = np.fromiter(
        itertools.chain.from_iterable(ids for ids in rows if isinstance(ids, list)), np.int32, count=bounds[-1]
    )
    labels = np.full_like(flat, IGNORED)
    roles = np.zeros(len(flat), np.int8)
    added = np.flatnonzero(writer.is_added[flat])
    cuts = np.searchsorted(added, bounds)
    found: Iterator[Encoded | UnusableConversation] = (
        ids
        if isinstance(ids, UnusableConversation)
        else _attempt(
            _placed,
            writer,
            draft,
            ids,
            (added[cuts[k] : cuts[k + 1]] - begin).tolist(),
            Encoded(flat[begin:end], labels[begin:end], roles[begin:end]),
        )
        for k, (draft, ids, (begin, end)) in enumerate(zip(usable, rows, itertools.pairwise(bounds), strict=True))
    )
    return [next(found) if isinstance(draft, _Draft) else draft for draft in drafts]


def _placed(writer: "_Writer", draft: _Draft, ids: list[int], added: list[int], row: Encoded) -> Encoded:
    """Fill the labels and roles of a row. added: positions of its added tokens."""
    if draft.is_text:
        row.roles[:] = ROLES.index("text")
    else:
        places = _Places(writer, draft, ids, added)
        for begin, end, role in draft.words:
            row.roles[slice(*places.around(begin, end))] = role
        for begin, end in draft.answers:
            first = places.exact(begin)
            if first is None:
                raise _boundary()
            last = places.end_of_turn(first, end)
            if last is None:
                raise UnusableConversation(
                    "template", f"the chat template of {writer.name} ends an assistant turn without a special token"
                )
            row.labels[first : last + 1] = row.input_ids[first : last + 1]
            row.roles[first : last + 1] = ASSISTANT
    if draft.is_learned_whole:
        row.labels[:] = row.input_ids
    row.labels[:1] = IGNORED
    return row


class _Places:
    """Where characters of a rendered row are among its tokens. starts, ends: of the added tokens, in characters."""

    def __init__(self, writer: "_Writer", draft: _Draft, ids: list[int], added: list[int]) -> None:
        self.writer, self.text, self.ids, self.added = writer, draft.text, ids, added
        self.is_escaped = draft.is_escaped
        self.starts: list[int] = []
        self.ends: list[int] = []
        names = {**writer.added, **writer.plain.stand_ins} if draft.is_escaped else writer.added
        at = 0
        for place in added:
            name = names[ids[place]]
            at = draft.text.find(name, at)
            if at < 0:
                break
            self.starts.append(at)
            at += len(name)
            self.ends.append(at)
        self.are_known = len(self.ends) == len(added)  # else a normalizer has rewritten one

    def exact(self, place: int) -> int | None:
        """Number of tokens of text[:place]; None when these are not the first of the whole."""
        if self.are_known and not self.is_escaped:
            first, found = self._before(place)
            if self.ids[first : first + len(found)] == found:
                return first + len(found)
        found = self._tokens(self.text[:place])
        return len(found) if self.ids[: len(found)] == found else None

    def end_of_turn(self, first: int, end: int) -> int | None:
        """Position of the token that ends the turn whose text ends at `end`: within the turn, or right behind it."""
        special, stop = self.writer.special, self.writer.end
        if not self.are_known:
            inside = [i for i in range(first, len(self._tokens(self.text[:end]))) if self.ids[i] in special]
            return inside[-1] if inside else None
        k = bisect_left(self.starts, end)
        inside = [i for i in self.added[:k] if i >= first and self.ids[i] in special]
        stops = [i for i in inside if self.ids[i] == stop]
        if stops:
            return stops[-1]
        if k < len(self.added) and self.ids[self.added[k]] == stop and not self.text[end : self.starts[k]].strip():
            return self.added[k]
        return inside[-1] if inside else None

    def around(self, begin: int, end: int) -> tuple[int, int]:
        """Tokens of text[begin:end], for the account: a token across its border is counted to it."""
        if self.is_escaped or not self.are_known:
            first, last = (_alike(self._tokens(self.text[:place]), self.ids) for place in (begin, end))
            return first, last
        first, found = self._before(begin)
        first += _alike(found, self.ids[first : first + len(found)])
        k = bisect_left(self.starts, end)
        last, until = (self.added[k], self.starts[k]) if k < len(self.added) else (len(self.ids), len(self.text))
        if until > end:
            last -= _alike(self.writer.tail(None, self.text[end:until])[::-1], self.ids[first:last][::-1])
        return first, last

    def _before(self, place: int) -> tuple[int, list[int]]:
        """Number of tokens up to the last added token before a place, and the ids of the text between."""
        k = bisect_right(self.ends, place)
        if k == 0:
            return 0, self.writer.tail(None, self.text[:place])
        at = self.added[k - 1]
        return at + 1, self.writer.tail(self.ids[at], self.text[self.ends[k - 1] : place])

    def _tokens(self, text: str) -> list[int]:
        return self.writer.plain.ids(text) if self.is_escaped else self.writer.ids([text])[0]


class _Writer:
    """A tokenizer and its chat template, taken apart once for many rows.

    added: texts of all added tokens, by id. control: of these, the special ones and those that the template writes.
    end: id of the token that ends an assistant's turn, None where none does. begins: [BOS], where the tokenizer sets
    one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.name = str(tokenizer.name_or_path) or "the tokenizer"
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.template = _compile_jinja_template(template)
        self.given = {
            **self.template.globals,
            **tokenizer.special_tokens_map,
            "documents": None,
            "strftime_now": TODAY.strftime,
        }
        self.marks_answers = GENERATION.search(template) is not None
        tokens = tokenizer.added_tokens_decoder
        self.parts_reasoning = PARTING.search(template) is not None
        self.added = {i: token.content for i, token in tokens.items()}
        self.special = {i for i, token in tokens.items() if token.special}
        self.control = {
            i: text for i, text in self.added.items() if i in self.special or (text in template and not text.isspace())
        }
        self.pattern = _any_of(self.control.values())
        self.is_added = np.zeros(max(len(tokenizer), *self.added, 0) + 1, bool)
        self.is_added[list(self.added)] = True
        self.eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.begins = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        self.tails: dict[tuple[int | None, str], list[int]] = {}
        self.openings, self.end = self._probe()

    def render(
        self, turns: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        return "".join(self._blocks(turns, tools, add_generation_prompt))

    def render_marked(self, turns: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the places in it of what stands in {% generation %}."""
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with self.template.environment.activate_tracker(blocks, spans):  # it reads in blocks how far the text has come
            for block in self._blocks(turns, tools, False):
                blocks.append(block)
        return "".join(blocks), spans

    def _blocks(
        self, turns: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> Iterator[str]:
        given = {"messages": turns, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            # What `template.generate` does, less merging all globals anew for every row.
            yield from self.template.root_render_func(self.template.new_context({**self.given, **given}, shared=True))
        except Exception as fault:  # a template fails by whatever error it likes
            raise UnusableConversation("template", f"the chat template of {self.name} refuses it: {fault}") from fault

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        self.backend.no_truncation()
        self.backend.no_padding()
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def tail(self, token: int | None, text: str) -> list[int]:
        """Token ids of a text that stands behind an added token, or at the beginning."""
        key = (token, text)
        if (found := self.tails.get(key)) is None:
            before = "" if token is None else self.added[token]
            found = self.ids([before + text])[0][0 if token is None else 1 :] if text else []
            if len(text) <= LONGEST_TAIL:
                if len(self.tails) > 10_000:
                    self.tails.clear()
                self.tails[key] = found
        return found

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """Turns as templates expect them: no empty keys, reasoning apart from the answer, arguments as values."""
        return [turn if self._is_plain(turn) else self._turn(turn) for turn in messages]

    def _is_plain(self, turn: Message) -> bool:
        content = turn.get("content")
        return isinstance(content, str) and len(turn) == 2 and not (self.parts_reasoning and THOUGHT in content)

    def _turn(self, turn: Message) -> Message:
        found = {key: value for key, value in turn.items() if value is not None}
        if self.parts_reasoning and found["role"] == "assistant" and THOUGHT in _content(found):
            # As Qwen 3's template does itself: its strip() would not see through the marks around control tokens.
            thought, _, answer = found["content"].rpartition(THOUGHT)
            found["content"] = answer.lstrip("\n")
            found["reasoning_content"] = thought.partition(THOUGHT)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
        if "reasoning_content" in found:
            found["thinking"] = found["reasoning_content"]  # gpt-oss
        if "tool_calls" in found:
            found["tool_calls"] = [_call(call, self.takes_arguments_as) for call in found["tool_calls"]]
        return found

    def words(
        self, text: str, turns: Sequence[Message], trained: Mapping[int, tuple[int, int]]
    ) -> list[tuple[int, int, int]]:
        """Places of the contents, by looking for each behind the one before; one that is rewritten is not found."""
        found, at = [], 0
        for i, turn in enumerate(turns):
            if i in trained:
                at = trained[i][1]
                continue
            role = turn["role"]
            for content in (_content(turn), _content(turn).strip()):
                opening = self.openings.get(role, "")
                begin = text.find(opening + content, max(0, at - len(opening))) if content else -1
                begin = begin + len(opening) if begin >= 0 else text.find(content, at) if content else -1
                if begin >= 0:
                    at = begin + len(content)
                    found.append((begin, at, ROLES.index(role) if role in ROLES else 0))
                    break
        return found

    def holds_control(self, turns: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        search = self.pattern.search
        for turn in turns:
            for key, value in turn.items():
                if key != "role" and (search(value) if isinstance(value, str) else _holds(search, value)):
                    return True
        return bool(tools) and _holds(search, tools)

    def marked(
        self, turns: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """The same with every control token in a content marked, so that the template's own can be told from them."""

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                if OPEN in value or CLOSE in value or STAND_IN in value:
                    raise _control(self, value)
                return self.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", value)
            if isinstance(value, Mapping):
                return {mark(key): mark(item) for key, item in value.items()}
            return [mark(item) for item in value] if isinstance(value, list) else value

        return [{**mark(turn), "role": turn["role"]} for turn in turns], mark(tools)

    @functools.cached_property
    def plain(self) -> "_Plain":
        return _Plain(self)

    @functools.cached_property
    def writes_tools(self) -> bool:
        tool = {"name": "probe_tool", "description": "a", "parameters": {"type": "object", "properties": {}}}
        return "probe_tool" in self._tried(PROBE, [{"type": "function", "function": tool}])

    @functools.cached_property
    def writes_calls(self) -> bool:
        return self.takes_arguments_as is not None

    @functools.cached_property
    def takes_arguments_as(self) -> type | None:
        """How the template wants the arguments of a call: as values or as JSON text; None where it writes no calls."""
        kinds: tuple[Any, ...] = ({}, "{}")
        for arguments in kinds:
            call = {"id": "123456789", "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
            calling = {"role": "assistant", "tool_calls": [call]}
            result = {"role": "tool", "content": "c", "name": "a", "tool_call_id": "123456789"}
            if "probe_tool" in self._tried([PROBE[0], calling, result, PROBE[1]], None):
                return type(arguments)
        return None

    def _tried(self, turns: Sequence[Message], tools: Sequence[Any] | None) -> str:
        try:
            return self.render(turns, tools)
        except UnusableConversation:
            return ""

    def _probe(self) -> tuple[dict[str, str], int | None]:
        """What the template writes before a content, by role (its last characters), and what ends an answer."""
        openings = {}
        for turns in ([*PROBE, *PROBE], [{"role": "system", "content": "probe system"}, *PROBE]):
            text = self._tried(turns, None)
            for turn in turns:
                if (at := text.rfind(turn["content"])) > 0:
                    openings[turn["role"]] = text[max(0, at - 12) : at]
        text = self._tried(PROBE, None)
        at = text.rfind(PROBE[1]["content"])
        ids = self.ids([text[at:]])[0] if at >= 0 else []
        return openings, next((i for i in ids if i in self.special), None)


class _Plain:
    """The same tokenizer without its control tokens, which are read as ordinary text; stand-ins have their place."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer
        self.stand_ins = {i: f"{STAND_IN}{i}{STAND_IN}" for i in writer.control}
        names = {**writer.added, **self.stand_ins}
        made = json.loads(writer.backend.to_str())
        made["post_processor"] = made["truncation"] = made["padding"] = None
        for token in made["added_tokens"]:
            token["content"] = names[token["id"]]
        self.backend = Tokenizer.from_str(json.dumps(made))
        self.real = {self.backend.token_to_id(name): i for i, name in names.items()}  # it numbers them anew
        self.by_text = {text: self.stand_ins[i] for i, text in writer.control.items()}
        self.marked = re.compile(f"{OPEN}({writer.pattern.pattern}){CLOSE}|{OPEN}|{CLOSE}|{writer.pattern.pattern}")

    def swap(self, text: str) -> str:
        """Rendered marked text as this tokenizer reads it: the template's control tokens by number, the marks gone."""
        return self.marked.sub(lambda found: found[1] or self.by_text.get(found[0], ""), text)

    def ids(self, text: str) -> list[int]:
        """Raises: UnusableConversation, when the tokenizer makes a control token of ordinary text all the same."""
        found = self.backend.encode(text, add_special_tokens=False).ids
        forged = any(i in self.writer.control and i not in self.real for i in found)
        written = sum(self.real.get(i) in self.stand_ins for i in found)
        if forged or written != text.count(STAND_IN) / 2:
            raise _control(self.writer, text)
        return [self.real.get(i, i) for i in found]


@functools.lru_cache(maxsize=8)
def _prepared(tokenizer: PreTrainedTokenizerFast, template: str, size: int) -> _Writer:
    return _Writer(tokenizer, template)


def _writer(tokenizer: PreTrainedTokenizerFast, tools: Sequence[Any] | None) -> _Writer:
    return _prepared(tokenizer, tokenizer.get_chat_template(None, tools), len(tokenizer))


def _call(call: Mapping[str, Any], wanted: type | None) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], wanted)}
    arguments = call.get("arguments")
    if wanted is str and not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if wanted is dict and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            pass
    return dict(call)


def _content(turn: Message) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else ""


def _function_name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _holds(search: Callable[[str], Any], value: Any) -> bool:
    if isinstance(value, str):
        return search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds(search, part) for item in value.items() for part in item)
    return isinstance(value, list) and any(_holds(search, item) for item in value)


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first elements that two sequences share."""
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))


def _same(text: str) -> str:
    return text


def _control(writer: _Writer, text: str) -> UnusableConversation:
    found = writer.pattern.search(text)
    return UnusableConversation("control_token", f"content holds the control token {found[0] if found else text!r}")


def _not_rendered(writer: _Writer, what: str) -> UnusableConversation:
    return UnusableConversation(
        "tools_not_rendered",
        f"the chat template of {writer.name} does not write {what}: set prompt.use=always for the project's own",
    )


def _boundary() -> UnusableConversation:
    return UnusableConversation("boundary", "a token reaches across the border between a prompt and its answer")
