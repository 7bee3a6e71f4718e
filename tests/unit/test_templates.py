"""What is trained under the chat templates of six families. Literals: tokens between bars, those trained in «»."""

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages.lib import chat
from stages.lib.schema.pack import ControlTokens, Labels, OnOverlong, Pack

FOLDER = Path(__file__).parent.parent / "templates"
CORPUS = (
    "system user assistant model tool ipython be kind hi yo and so ok on Jul below is a task Instruction Response "
    'name add parameters arguments id type function think why tools tool response sum :\n ### {" ": "} "}, [{" []'
).split(" ")
SPECIAL = {
    "chatml": "<|endoftext|> <|im_start|> <|im_end|>",
    "llama3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "mistral": "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
    "[TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
    "gemma": "<bos> <eos> <start_of_turn> <end_of_turn>",
    "qwen3": "<|endoftext|> <|im_start|> <|im_end|>",
    "alpaca": "<s> </s>",
}
ORDINARY = {"qwen3": ["<think>", "</think>", "<tool_call>", "</tool_call>"], "gemma": ["\n\n"]}
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>", "alpaca": "<s>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<eos>", "qwen3": "<|im_end|>"}

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SO, OK = {"role": "user", "content": "and so"}, {"role": "assistant", "content": "ok"}
KIND = {"role": "system", "content": "be kind"}
TOOLS = [{"name": "sum"}]
CALL = {"role": "assistant", "tool_calls": [{"id": "123456789", "function": {"name": "sum", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "3"}


@functools.cache
def family(name: str) -> Any:
    """A tokenizer in the manner of the family, with words for tokens, and its chat template."""
    tokenizer = Tokenizer(models.BPE())
    is_spm = name in ("mistral", "gemma")
    alphabet = [*map(chr, range(32, 127)), "\n"] if is_spm else pre_tokenizers.ByteLevel.alphabet()
    if is_spm:
        words = pre_tokenizers.Metaspace(prepend_scheme="first" if name == "mistral" else "never")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split("\n", "isolated")])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL[name].split()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *(f" {word}" for word in CORPUS)] * 2, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ORDINARY.get(name, [])])
    if bos := BOS.get(name):  # a BOS of the tokenizer's own beside the template's
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=EOS.get(name, "</s>"),
        chat_template=(FOLDER / f"{name}.jinja").read_text(),
    )


def shown(name: str, messages: list[Any], tools: list[Any] | None = None, labels: str = "assistant_only") -> str:
    found = chat.encode(family(name), messages, tools, labels=Labels(labels))
    assert all(label in (chat.IGNORED, i) for i, label in zip(found.input_ids, found.labels, strict=True))
    runs = []
    for trained, run in itertools.groupby(
        zip(found.input_ids, found.labels, strict=True), lambda pair: pair[1] != chat.IGNORED
    ):
        text = barred(name, [i for i, _ in run])
        runs.append(f"«{text}»" if trained else text)
    return "|".join(runs)


def barred(name: str, ids: list[Any]) -> str:
    return "|".join(map(family(name).decode, ids))


def asked(name: str, messages: list[Any]) -> str:
    return barred(name, chat.prompt_ids(family(name), messages))


LLAMA = "<|begin_of_text|>|<|start_header_id|>|system|<|end_header_id|>|\n|\n|on| |2|6| Jul| |2|0|2|4|\n|\n|"
BELOW = "<s>|below| is| a| task|\n|\n|###| Instruction|:|\n|hi|\n|\n|###| Response|:|\n|"


@pytest.mark.parametrize(
    ("name", "literal"),
    [
        (
            "chatml",
            "<|im_start|>|system|\n|be| kind|<|im_end|>|\n|<|im_start|>|user|\n|hi|<|im_end|>|\n|"
            "<|im_start|>|assistant|\n|«yo|<|im_end|>»|\n|<|im_start|>|user|\n|and| so|<|im_end|>|\n|"
            "<|im_start|>|assistant|\n|«ok|<|im_end|>»|\n",
        ),
        (
            "llama3",
            f"{LLAMA}be| kind|<|eot_id|>|<|start_header_id|>|user|<|end_header_id|>|\n|\n|hi|<|eot_id|>|"
            "<|start_header_id|>|assistant|<|end_header_id|>|\n|\n|«yo|<|eot_id|>»|"
            "<|start_header_id|>|user|<|end_header_id|>|\n|\n|and| so|<|eot_id|>|"
            "<|start_header_id|>|assistant|<|end_header_id|>|\n|\n|«ok|<|eot_id|>»",
        ),
        ("mistral", "<s>|[INST]| be| kind|\n|\n|hi|[/INST]|« yo|</s>»|[INST]| and| so|[/INST]|« ok|</s>»"),
        (
            "alpaca",
            "<s>|be| kind|\n|\n|###| Instruction|:|\n|hi|\n|\n|###| Response|:|\n|«yo|</s>»|"
            "\n|\n|###| Instruction|:|\n|and| so|\n|\n|###| Response|:|\n|«ok|</s>»",
        ),
    ],
)
def test_every_answer_is_trained_with_its_end_and_never_system_or_user(name: str, literal: str) -> None:
    assert shown(name, [KIND, HI, YO, SO, OK]) == literal


def test_gemma_has_no_system_turn_and_calls_the_assistant_model() -> None:
    assert shown("gemma", [HI, YO, SO, OK]) == (
        "<bos>|<start_of_turn>|user|\n|hi|<end_of_turn>|\n|<start_of_turn>|model|\n|«yo|<end_of_turn>»|\n|"
        "<start_of_turn>|user|\n|and| so|<end_of_turn>|\n|<start_of_turn>|model|\n|«ok|<end_of_turn>»|\n"
    )
    with pytest.raises(chat.UnusableConversation, match="System role not supported") as fault:
        shown("gemma", [KIND, HI, YO])
    assert fault.value.reason == "template"


def test_qwen_3_learns_to_think_in_the_last_turn_which_alone_is_written_as_it_was_answered() -> None:
    thinking = {**OK, "reasoning_content": "why so"}
    written = (
        "<|im_start|>|user|\n|hi|<|im_end|>|\n|<|im_start|>|assistant|\n|yo|<|im_end|>|\n|"
        "<|im_start|>|user|\n|and| so|<|im_end|>|\n|<|im_start|>|assistant|\n|"
        "«<think>|\n|why| so|\n|</think>|\n|\n|ok|<|im_end|>»|\n"
    )
    assert shown("qwen3", [HI, YO, SO, thinking], labels="last_turn") == written
    inline = {"role": "assistant", "content": "<think>\nwhy so\n</think>\n\nok"}
    assert shown("qwen3", [HI, YO, SO, inline], labels="last_turn") == written
    with pytest.raises(chat.UnusableConversation, match=r"earlier turns differently.*pack\.labels=last_turn") as fault:
        shown("qwen3", [HI, YO, SO, thinking])
    assert fault.value.reason == "template"


def test_qwen_3_writes_an_empty_thought_where_there_is_none() -> None:
    assert shown("qwen3", [HI, YO]) == (
        "<|im_start|>|user|\n|hi|<|im_end|>|\n|<|im_start|>|assistant|\n|"
        "«<think>|\n|\n|</think>|\n|\n|yo|<|im_end|>»|\n"
    )


@pytest.mark.parametrize(
    ("name", "labels", "literal"),
    [
        (
            "llama3",
            "assistant_only",
            f"{LLAMA}<|eot_id|>|<|start_header_id|>|user|<|end_header_id|>|\n|\n|"
            '{"|name|":| |"|sum|"}|\n|\n|hi|<|eot_id|>|<|start_header_id|>|assistant|<|end_header_id|>|\n|\n|'
            '«{"|name|":| |"|sum|"|,| |"|parameters|":| |{|}|}|<|eot_id|>»|'
            '<|start_header_id|>|ipython|<|end_header_id|>|\n|\n|"|3|"|<|eot_id|>|'
            "<|start_header_id|>|assistant|<|end_header_id|>|\n|\n|«ok|<|eot_id|>»",
        ),
        (
            "mistral",
            "assistant_only",
            '<s>|[AVAILABLE_TOOLS]| [{"|name|"|:| "|s|um|"|}|]|[/AVAILABLE_TOOLS]|[INST]| hi|[/INST]|'
            '«[TOOL_CALLS]| [{"|name|"|:| "|s|um|"|,| "|ar|gu|ment|s|"|:| |{|}|}|]|</s>»|'
            "[TOOL_RESULTS]| |3|[/TOOL_RESULTS]|« ok|</s>»",
        ),
        (
            "qwen3",
            "last_turn",
            '<|im_start|>|system|\n|<|tools|>|\n|{"|name|":| |"|sum|"}|\n|<|/|tools|>|<|im_end|>|\n|'
            "<|im_start|>|user|\n|hi|<|im_end|>|\n|<|im_start|>|assistant|\n|"
            '<tool_call>|\n|{"|name|":| |"|sum|"|,| |"|arguments|":| |{|}|}|\n|</tool_call>|<|im_end|>|\n|'
            "<|im_start|>|user|\n|<|tool|_|response|>|\n|3|\n|<|/|tool|_|response|>|<|im_end|>|\n|"
            "<|im_start|>|assistant|\n|«<think>|\n|\n|</think>|\n|\n|ok|<|im_end|>»|\n",
        ),
    ],
)
def test_calls_are_trained_and_neither_the_tools_nor_what_they_answer(name: str, labels: str, literal: str) -> None:
    assert shown(name, [HI, CALL, RESULT, OK], TOOLS, labels) == literal


@pytest.mark.parametrize("name", ["chatml", "gemma", "alpaca"])
@pytest.mark.parametrize(("messages", "tools"), [([HI, CALL, RESULT, OK], None), ([HI, OK], TOOLS)])
def test_tools_that_a_template_would_leave_out_are_not_trained_without(name: str, messages: Any, tools: Any) -> None:
    with pytest.raises(chat.UnusableConversation, match=r"does not write tool.*prompt\.use=always") as fault:
        chat.encode(family(name), messages, tools)
    assert fault.value.reason == "tools_not_rendered"


@pytest.mark.parametrize(
    ("name", "literal"),
    [
        (
            "chatml",
            "<|im_start|>|system|\n|be| kind|<|im_end|>|\n|<|im_start|>|user|\n|hi|<|im_end|>|\n|"
            "<|im_start|>|assistant|\n",
        ),
        (
            "llama3",
            f"{LLAMA}<|eot_id|>|<|start_header_id|>|user|<|end_header_id|>|\n|\n|hi|<|eot_id|>|"
            "<|start_header_id|>|assistant|<|end_header_id|>|\n|\n",
        ),
        ("mistral", "<s>|[INST]| hi|[/INST]"),
        ("gemma", "<bos>|<start_of_turn>|user|\n|hi|<end_of_turn>|\n|<start_of_turn>|model|\n"),
        ("qwen3", "<|im_start|>|user|\n|hi|<|im_end|>|\n|<|im_start|>|assistant|\n"),
        ("alpaca", BELOW.removesuffix("|")),
    ],
)
def test_the_model_is_asked_with_exactly_what_stands_before_a_trained_answer(name: str, literal: str) -> None:
    assert asked(name, [HI]) == literal
    assert shown(name, [HI, YO]).startswith(f"{literal}|«")


@pytest.mark.parametrize(("name", "bos"), sorted(BOS.items()))
def test_a_conversation_has_one_bos_although_template_and_tokenizer_both_set_one(name: str, bos: str) -> None:
    tokenizer = family(name)
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    for found in (chat.prompt_ids(tokenizer, [HI]), chat.encode(tokenizer, [HI, YO]).input_ids.tolist()):
        assert found[0] == tokenizer.bos_token_id
        assert found.count(tokenizer.bos_token_id) == 1


PIECES = [
    "hi",
    "yo",
    " ",
    "  ",
    "\n",
    "\n\n",
    "task",
    "é",
    "日本",
    "🙂",
    "3",
    "</",
    "|>",
    "user\n",
    "### Response:\n",
    ".",
]


def random_rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)

    def words() -> str:
        return "x".join("".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 2)))

    rows = []
    for _ in range(count):
        turns = [
            turn for _ in range(draw.randint(1, 3)) for turn in ({**HI, "content": words()}, {**YO, "content": words()})
        ]
        system = [{**KIND, "content": words()}] if draw.random() < 0.3 else []
        rows.append({"kind": "chat", "messages": [*system, *turns], "tools": None, "chosen": None, "label": None})
    return rows


def every_prefix_tokenized(tokenizer: Any, messages: list[Any], wanted: list[int]) -> list[int] | None:
    """Labels of the wanted answers by tokenizing the whole text up to each of them; None where that is no prefix."""
    text = chat.render(tokenizer, messages)
    ids = chat.tokenize(tokenizer, text)
    labels = [chat.IGNORED] * len(ids)
    for i in wanted:
        prompt = chat.render(tokenizer, messages[:i], add_generation_prompt=True)
        start = chat.tokenize(tokenizer, prompt)
        turn = chat.render(tokenizer, messages[: i + 1])
        if not (text.startswith(prompt) and text.startswith(turn)) or ids[: len(start)] != start:
            return None
        special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
        end = next(k for k in range(len(start), len(ids)) if ids[k] in special)
        labels[len(start) : end + 1] = ids[len(start) : end + 1]
    return labels


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("labels", [Labels.assistant_only, Labels.last_turn])
def test_labels_found_by_added_tokens_are_those_of_tokenizing_every_prefix(name: str, labels: Labels) -> None:
    tokenizer = family(name)
    rows = [row for row in random_rows(60) if not (name == "gemma" and row["messages"][0]["role"] == "system")]
    settings = Pack(512, OnOverlong.drop, labels, ControlTokens.text, 0.05)
    usable = 0
    for row, found in zip(rows, chat.encode_all(tokenizer, rows, settings), strict=True):
        answers = [i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
        wanted = answers[-1:] if labels is Labels.last_turn else answers
        expected = every_prefix_tokenized(tokenizer, row["messages"], wanted)
        if isinstance(found, chat.UnusableConversation):
            assert expected is None, str(found)
            continue
        usable += 1
        assert found.labels.tolist() == expected
        assert found.input_ids.tolist() == chat.tokenize(tokenizer, chat.render(tokenizer, row["messages"]))
    assert usable > 10
