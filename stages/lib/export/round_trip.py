"""Does what was exported write and read chats as training did: text, token ids, added tokens, BOS, stop ids?

Two questions: what the files themselves say (the head of a GGUF file, the tokenizer of a folder), and what their own
runtime makes of chats.

One difference is none of the export's: a runtime reads the rendered text as a whole, so that words which look like a
control token become that token, where training encodes them as text. Such chats are counted, and held to the rest.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader, TokenType
from transformers import PreTrainedTokenizerFast

from stages.lib import chat, files, gguf_weights, held_out, records
from stages.lib.errors import GateError, ModelError
from stages.lib.export.formats.exporter import Session

SPLITS = ("test", "validation", "train")
Chat = Sequence[Mapping[str, str]]


def _turns(*contents: str, system: str | None = None) -> Chat:
    """user, assistant, user, ... with these contents, behind a system turn if there is one."""
    spoken = [{"role": role, "content": text} for role, text in zip(itertools.cycle(_ROLES), contents, strict=False)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *spoken]


_ROLES = ("user", "assistant")
HARD = (
    _turns("What is 2 + 2?  Answer in one word.", "Four.", 'As JSON, {"sum": 4}?\n\nÜmläute, 漢字 and `code` too.'),
    _turns("  spaces before and behind  \n"),
    _turns("lines\r\nof another\r\n\r\n\tkind"),
    _turns("hi", system=""),
    _turns("hi", system="  Be brief.\n"),
    _turns(""),
    _turns("again?\n", "  so \n\n", "\n yes"),
    _turns("nothing said", "", "and now?"),
    _turns("e\u0301 \u00e9 \u200d \U0001f469\u200d\U0001f469\u200d\U0001f467 שלום \u00a0 \ufeff \u2028 \u0007"),
    _turns("0x1F 1234567890 3.14159   1,000"),
    _turns("{{ content }} {% if x %} \\n </s> [INST]"),
)
"""What templates and tokenizers are known to differ on; the control tokens of the model itself come with them."""


@dataclass(frozen=True)
class Expected:
    """How training writes and reads chats, each with the opening of its answer.

    tokens: of the rendered text as a whole. parsed: chats in whose words a control token stands (see above).
    """

    chats: Sequence[Chat]
    rendered: Sequence[str]
    tokens: Sequence[list[int]]
    parsed: int
    tokenizer: PreTrainedTokenizerFast
    stop_ids: Sequence[int]


def expected(splits: Path, tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int], count: int) -> Expected:
    """The hard chats, and `count` of the data's, splits and tasks in turn.

    Left out are chats with tools, which every runtime writes in its own way, and those that training itself cannot
    write (Gemma's template refuses a system turn).
    """
    stops = tokenizer.convert_ids_to_tokens(list(stop_ids))
    made_up = (*HARD, *(_turns(f"{stop}\n{stop}system\nYou are {stop}") for stop in stops))
    chats, rendered, tokens, parsed = [], [], [], 0
    for turns in (*made_up, *itertools.islice(_of_data(splits, tokenizer, count), count)):
        try:
            text, ids = chat.render(tokenizer, turns, add_generation_prompt=True), chat.prompt_ids(tokenizer, turns)
        except chat.UnusableConversation:
            continue
        chats.append(turns)
        rendered.append(text)
        tokens.append(chat.tokenize(tokenizer, text))
        parsed += tokens[-1] != ids
    return Expected(chats, rendered, tokens, parsed, tokenizer, stop_ids)


def _of_data(splits: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> Iterator[Chat]:
    """Prompts of the data, without tools."""
    taken = []
    for name in SPLITS:
        path = splits / f"{name}.parquet"
        rows = held_out.spread(records.read(path), 2 * count) if path.is_file() else []
        rows, _ = held_out.usable(tokenizer, rows)
        prompts = [(records.conversation(row) or [])[:-1] for row in rows if not row["tools"]]
        taken.append([turns for turns in prompts if turns and all("content" in turn for turn in turns)])
    for group in itertools.zip_longest(*taken):
        yield from (turns for turns in group if turns is not None)


def check_session(name: str, session: Session, e: Expected) -> dict[str, float]:
    """Hold what a runtime made of the chats to what training makes of them.

    The text may lack its first BOS, where the runtime adds that by itself (add_bos_token): token ids tell.

    Returns: chats compared; BOS tokens a chat begins with or holds, at most; chats whose words became control tokens.
    Raises: GateError, with the first place where they differ.
    """
    bos = e.tokenizer.bos_token or ""
    bos_counts = [0]
    for place, (text, ids, found_text, found) in enumerate(
        zip(e.rendered, e.tokens, session.rendered, session.tokens, strict=True)
    ):
        where = f"{name}: its runtime writes chat {place + 1} of {len(e.chats)} otherwise than training did"
        advice = "Check the chat template and tokenizer of models/base, and export.gguf_pre_tokenizer."
        if found_text not in (text, text.removeprefix(bos)):
            at = _first_difference(text, found_text)
            raise GateError(
                f"{where}, from character {at}: found {found_text[at : at + 40]!r}, expected {text[at : at + 40]!r}. "
                + advice
            )
        if found != ids:
            at = _first_difference(ids, found)
            shown = [e.tokenizer.convert_ids_to_tokens(one[at : at + 8]) for one in (found, ids)]
            doubled = [one.count(e.tokenizer.bos_token_id) for one in (found, ids)]
            told = f" ({doubled[0]} BOS tokens, expected {doubled[1]})" if doubled[0] != doubled[1] else ""
            raise GateError(f"{where}, from token {at}: found {shown[0]}, expected {shown[1]}{told}. {advice}")
        bos_counts.append(found.count(e.tokenizer.bos_token_id))
    return {"chats": len(e.chats), "bos": max(bos_counts), "control_text": e.parsed}


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    ends = min(len(one), len(other))
    return next((place for place in range(ends) if one[place] != other[place]), ends)


def check_files(path: Path, e: Expected) -> None:
    """Hold what the files say about template, tokens and stops to training: a GGUF file's head, or a folder.

    Raises: GateError, naming all that differs.
    """
    if path.is_file():
        faults = list(_of_gguf(gguf_weights.read(path), e))
    elif (path / "tokenizer.json").is_file():
        faults = list(_of_folder(path, e))
    else:
        faults = []  # no tokenizer in it, hence none to be wrong
    if faults:
        raise GateError(
            f"{path.name}: not what the model was trained with (found, expected):\n  "
            + "\n  ".join(faults)
            + "\nThe file is damaged, or its converter changed it. Leave the format out of export.formats."
        )


def _of_gguf(reader: GGUFReader, e: Expected) -> Iterator[str]:
    def value(key: str) -> object:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    if value("general.type") == "adapter":  # weights alone: tokenizer and template are those of the file it is laid on
        return
    tokenizer = e.tokenizer
    yield from _difference("tokenizer.chat_template", value("tokenizer.chat_template"), tokenizer.chat_template)
    for name, wanted in (("eos", tokenizer.eos_token_id), ("bos", tokenizer.bos_token_id)):
        found = value(f"tokenizer.ggml.{name}_token_id")
        if name == "eos" or found is not None:
            yield from _difference(f"tokenizer.ggml.{name}_token_id", found, wanted)
    eot = value("tokenizer.ggml.eot_token_id")
    if eot is not None and eot not in e.stop_ids:
        yield f"tokenizer.ggml.eot_token_id: {eot}, one of the stop ids {list(e.stop_ids)}"
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list):
        yield "tokenizer.ggml.tokens and token_type: not there, the vocabulary"
        return
    # SentencePiece's mark of a space stands as the space itself in added tokens of a GGUF file.
    words = {id: text.replace("▁", " ") for text, id in tokenizer.get_vocab().items()}
    held = {id: text.replace("▁", " ") for id, text in enumerate(tokens)}
    wrong = [id for id in sorted(words) if held.get(id) != words[id]]
    if wrong:
        first = wrong[0]
        yield f"tokenizer.ggml.tokens: {len(wrong)} differ, token {first} is {held.get(first)!r}, {words[first]!r}"
    whole = {TokenType.CONTROL, TokenType.USER_DEFINED}  # of these types text is read as one token
    for id, added in sorted(tokenizer.added_tokens_decoder.items()):
        allowed = {TokenType.CONTROL} if added.special else whole
        if id == tokenizer.unk_token_id:
            allowed = {TokenType.CONTROL, TokenType.UNKNOWN}  # llama.cpp reads text as either alike
        if id < len(types) and types[id] not in allowed:
            kind = TokenType(types[id]).name
            yield f"tokenizer.ggml.token_type: token {id} {added.content!r} is {kind}, an added token"


def _of_folder(path: Path, e: Expected) -> Iterator[str]:
    try:
        found = chat.load_tokenizer(path)
    except ModelError as fault:
        yield str(fault)
        return
    tokenizer = e.tokenizer
    yield from _difference("chat template", found.chat_template, tokenizer.chat_template)
    yield from _difference("vocabulary", _vocabulary(found), _vocabulary(tokenizer))
    for name in ("eos_token_id", "bos_token_id"):
        yield from _difference(f"tokenizer's {name}", getattr(found, name), getattr(tokenizer, name))
    stops = _stops(path)
    if not set(stops) <= set(e.stop_ids):
        yield f"eos_token_id: {stops}, among the stop ids {list(e.stop_ids)}"


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, str, bool | None]]:
    """id, text, and of added tokens whether they are special."""
    added = {id: token.special for id, token in tokenizer.added_tokens_decoder.items()}
    return sorted((id, text, added.get(id)) for text, id in tokenizer.get_vocab().items())


def _stops(folder: Path) -> list[int]:
    """Stop ids that the folder's own files tell its runtime."""
    found: list[int] = []
    for name, section in (("generation_config.json", None), ("genai_config.json", "model")):
        if (folder / name).is_file():
            config = files.read_json(folder / name)
            ids = (config[section] if section else config).get("eos_token_id", [])
            found += ids if isinstance(ids, list) else [ids]
    return found


def _difference(what: str, found: object, expected: object) -> Iterator[str]:
    if found == expected:
        return
    if isinstance(found, (str, list)) and isinstance(expected, (str, list)):
        at = _first_difference(found, expected)
        found, expected = found[at : at + 40], expected[at : at + 40]
        what = f"{what}, from place {at}"
    shown = [text if len(text) < 200 else f"{text[:200]}..." for text in map(repr, (found, expected))]
    yield f"{what}: {shown[0]}, {shown[1]}"
