"""The Ollama Modelfile: the chat template as a Go template, the tokens that stop, the model's file.

Ollama does not read the Jinja template of a GGUF file; without TEMPLATE it guesses. The Go template is taken from what
the Jinja template writes around each turn, and is used only if that explains whole conversations to the character.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from stages.lib import chat, files, gguf_weights
from stages.lib.errors import GateError

SYSTEM = {"role": "system", "content": "\x01S\x01"}
USER = {"role": "user", "content": "\x01U\x01"}
ASSISTANT = {"role": "assistant", "content": "\x01A\x01"}
PROBES = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
)


@dataclass(frozen=True)
class Pieces:
    """What the template writes around a turn, by role; then what it writes for the model to answer.

        <|im_start|>user\\n  CONTENT  <|im_end|>\\n   ...   <|im_start|>assistant\\n
        opening["user"]              closing["user"]       generation

    system: content of the turn it writes by itself when a conversation has no system turn; None when it writes none.
    """

    opening: Mapping[str, str]
    closing: Mapping[str, str]
    generation: str
    system: str | None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What Ollama makes of the Modelfile: SYSTEM comes first where the conversation has no system turn."""
        turns = list(messages)
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return (
            "".join(self.opening[turn["role"]] + turn["content"] + self.closing[turn["role"]] for turn in turns)
            + self.generation
        )


def pieces(tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]) -> Pieces | None:
    """Take the chat template apart; None when a plain sequence of turns does not explain what it writes.

    Args: stops: texts of the stop tokens, by which a turn ends.
    """

    bos = tokenizer.bos_token_id
    set_by_ollama = tokenizer.bos_token if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else ""

    def rendered(messages: Sequence[Mapping[str, str]]) -> str:
        return chat.render(tokenizer, messages, add_generation_prompt=True).removeprefix(set_by_ollama)

    try:
        before_system, rest = rendered([SYSTEM, USER]).split(SYSTEM["content"])
        system_to_user, user_to_end = rest.split(USER["content"])
        _, user_to_user, _ = rendered([SYSTEM, USER, ASSISTANT, USER]).split(USER["content"])
        user_to_assistant, assistant_to_user = user_to_user.split(ASSISTANT["content"])
        before_user = rendered([USER]).split(USER["content"])[0]
        probes = [rendered(probe) for probe in PROBES]
    except Exception:  # a template refuses what it does not know (a system turn, say) by whatever error it likes
        return None
    closing_system, opening_user = _border(system_to_user, stops)
    closing_user, opening_assistant = _border(user_to_assistant, stops)
    closing_assistant, _ = _border(assistant_to_user, stops)
    written = before_user.removesuffix(opening_user)
    found = Pieces(
        opening={"system": before_system, "user": opening_user, "assistant": opening_assistant},
        closing={"system": closing_system, "user": closing_user, "assistant": closing_assistant},
        generation=user_to_end.removeprefix(closing_user),
        system=written.removeprefix(before_system).removesuffix(closing_system) if written else None,
    )
    return found if [found.render(probe) for probe in PROBES] == probes else None


def _border(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """Divide what stands between two contents: a turn closes with its stop token and the white space behind it."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        return "", text
    opening = text[min(ends) :].lstrip()
    return text.removesuffix(opening) if opening else text, opening


def check(file: Path, stops: Sequence[str], context: int) -> None:
    """Hold what the Modelfile will say to the GGUF file it names: where answers stop, and how long a chat may be.

    The template needs no check here: it explains the tokenizer's, and round_trip.check_files compared that.

    Raises: GateError, when they differ.
    """
    reader = gguf_weights.read(file)
    architecture = reader.fields["general.architecture"].contents()
    tokens = reader.fields["tokenizer.ggml.tokens"]
    ends = {
        tokens.contents(reader.fields[key].contents())
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in reader.fields
    }
    length = reader.fields[f"{architecture}.context_length"].contents()
    faults = [f"stop {end!r} of the file is none of {list(stops)}" for end in sorted(ends - set(stops))]
    faults += [f"num_ctx {context}, {architecture}.context_length of the file is {length}"] if length != context else []
    if faults:
        raise GateError(f"Modelfile: not what {file.name} says: {'; '.join(faults)}. Check models/merged/config.json.")


def write(file: str, found: Pieces, stops: Sequence[str], context: int) -> str:
    """The text of the Modelfile.

    Args: file: name of the GGUF file beside it. stops: texts of the stop tokens. context: tokens.
    """
    turns = "".join(
        f'{{{{ if eq .Role "{role}" }}}}{found.opening[role]}{{{{ .Content }}}}{found.closing[role]}{{{{ end }}}}'
        for role in ("system", "user", "assistant")
    )
    lines = [
        f"FROM ./{file}",
        f'TEMPLATE """{{{{ range .Messages }}}}{turns}{{{{ end }}}}{found.generation}"""',
        *([f'SYSTEM """{found.system}"""'] if found.system is not None else []),
        *[f'PARAMETER stop "{stop}"' for stop in stops],
        f"PARAMETER num_ctx {context}",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def generation_config(merged: Path, tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]) -> dict[str, Any]:
    """What runtimes read beside a format that has no such file: the merged model's settings, all stop ids, greedy."""
    path = merged / "generation_config.json"
    given = files.read_json(path) if path.is_file() else {"bos_token_id": tokenizer.bos_token_id}
    sampling = ("temperature", "top_k", "top_p")
    kept = {key: value for key, value in given.items() if key not in sampling}
    return kept | {"do_sample": False, "eos_token_id": list(stop_ids)}
